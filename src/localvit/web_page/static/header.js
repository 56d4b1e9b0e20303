"use strict";
// What the header of an image file says: its size in pixels, and how the image is to be turned when it is shown.

const JPEG_SIZES = [0xc0, 0xc1, 0xc2, 0xc3, 0xc5, 0xc6, 0xc7, 0xc9, 0xca, 0xcb, 0xcd, 0xce, 0xcf];

/**
 * The size and the EXIF orientation of an image file. The orientation in `bytes` is set to 1, so that the browser
 * decodes the pixels as they are stored: training and `localvit predict` use them so.
 *
 * @param {Uint8Array} bytes The file.
 * @returns {{width: number, height: number, orientation: number}} Zeros for a size that is unknown; orientation 1 to 8.
 */
function readHeader(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const header = {width: 0, height: 0, orientation: 1};
  try {
    if (view.getUint16(0) === 0xffd8) readJpeg(view, header);
    else if (view.getUint32(0) === 0x89504e47) readPng(view, header);
    else if (ascii(view, 0, 4) === "RIFF" && ascii(view, 8, 4) === "WEBP") readWebp(view, header);
  } catch (error) {
    if (!(error instanceof RangeError)) throw error; // a file that ends here; the decoder says so
  }
  return header;
}

function readJpeg(view, header) {
  for (let at = 2; view.getUint8(at) === 0xff; ) {
    const marker = view.getUint8(at + 1);
    if (marker === 0xff) { at += 1; continue; } // padding
    if (marker === 0xda) return; // the pixels
    if (JPEG_SIZES.includes(marker)) {
      [header.height, header.width] = [view.getUint16(at + 5), view.getUint16(at + 7)];
    } else if (marker === 0xe1 && ascii(view, at + 4, 6) === "Exif\0\0") {
      resetOrientation(view, at + 10, header);
    }
    at += 2 + view.getUint16(at + 2);
  }
}

function readPng(view, header) {
  [header.width, header.height] = [view.getUint32(16), view.getUint32(20)];
  for (let at = 8; ascii(view, at + 4, 4) !== "IEND"; at += 12 + view.getUint32(at)) {
    if (ascii(view, at + 4, 4) === "eXIf") resetOrientation(view, at + 8, header);
  }
}

function readWebp(view, header) {
  for (let at = 12, length; at < view.byteLength; at += 8 + length + (length % 2)) {
    length = view.getUint32(at + 4, true);
    if (ascii(view, at, 4) !== "EXIF") continue;
    resetOrientation(view, ascii(view, at + 8, 6) === "Exif\0\0" ? at + 14 : at + 8, header);
  }
}

/** Set the orientation in the EXIF data at `start` to 1, and keep the one that was there in `header`. */
function resetOrientation(view, start, header) {
  const little = view.getUint16(start) === 0x4949;
  const directory = start + view.getUint32(start + 4, little);
  const count = view.getUint16(directory, little);
  for (let at = directory + 2; at < directory + 2 + 12 * count; at += 12) {
    if (view.getUint16(at, little) !== 0x0112) continue;
    const orientation = view.getUint16(at + 8, little);
    if (orientation >= 1 && orientation <= 8) header.orientation = orientation;
    view.setUint16(at + 8, 1, little);
  }
}

function ascii(view, start, length) {
  let text = "";
  for (let at = start; at < start + length; at++) text += String.fromCharCode(view.getUint8(at));
  return text;
}
