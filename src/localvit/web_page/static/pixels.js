"use strict";
// Image files as pixels, the same that PIL gives for `image.convert("RGB")`: as they are stored, without the file's
// orientation and color profile, and with the colors of transparent pixels.

const MOST_PIXELS = 64e6; // of one image; each takes about 22 bytes of memory
const TILE = 2048; // pixels; a graphics card may take no more than 4096 at once

/** What is wrong with an image. The message continues a sentence that starts with the name of its file. */
class ImageError extends Error {}

/**
 * @param {Blob} file
 * @returns {Promise<{bitmap: ImageBitmap, orientation: number}>}
 */
async function decode(file) {
  const bytes = new Uint8Array(await file.arrayBuffer().catch(() => {
    throw new ImageError("cannot be read: it was moved or deleted, or it is a folder.");
  }));
  if (!bytes.length) throw new ImageError("is empty.");
  const {width, height, orientation} = readHeader(bytes);
  checkSize(width, height);
  const asStored = {imageOrientation: "none", premultiplyAlpha: "none", colorSpaceConversion: "none"};
  const bitmap = await createImageBitmap(new Blob([bytes], {type: file.type}), asStored).catch(() => {
    throw new ImageError("cannot be read as an image: it is damaged, or not a JPEG, PNG, WebP, GIF or BMP file, nor " +
      "of another kind that this browser reads.");
  });
  checkSize(bitmap.width, bitmap.height);
  return {bitmap, orientation};
}

function checkSize(width, height) {
  if (width * height <= MOST_PIXELS) return;
  throw new ImageError(`has ${width.toLocaleString("en")} × ${height.toLocaleString("en")} pixels, and this ` +
    `page takes at most ${MOST_PIXELS / 1e6} million: make it smaller.`);
}

/**
 * The pixels of an image, one color after another.
 *
 * @param {ImageBitmap} bitmap
 * @returns {{planes: Uint8Array, exact: boolean}} Red, green, blue of each pixel, 3 × height × width. They are not
 *     exact if the image is transparent and the browser cannot give the colors of transparent pixels.
 */
function pixelsOf(bitmap) {
  const {width, height} = bitmap;
  const planes = new Uint8Array(3 * width * height);
  const reader = webGLReader() ?? canvasReader();
  let exact = true;
  for (let top = 0; top < height; top += TILE) {
    for (let left = 0; left < width; left += TILE) {
      const [tileWidth, tileHeight] = [Math.min(TILE, width - left), Math.min(TILE, height - top)];
      const rgba = reader.read(bitmap, left, top, tileWidth, tileHeight);
      copyTile(rgba, tileWidth, tileHeight, planes, top * width + left, width, width * height);
      exact &&= reader.keepsTransparent || isOpaque(rgba);
    }
  }
  return {planes, exact};
}

function copyTile(rgba, tileWidth, tileHeight, planes, start, width, planeSize) {
  for (let row = 0, from = 0; row < tileHeight; row++) {
    for (let to = start + row * width, end = to + tileWidth; to < end; to++, from += 4) {
      planes[to] = rgba[from];
      planes[planeSize + to] = rgba[from + 1];
      planes[2 * planeSize + to] = rgba[from + 2];
    }
  }
}

function isOpaque(rgba) {
  for (let at = 3; at < rgba.length; at += 4) if (rgba[at] !== 255) return false;
  return true;
}

/** A reader through a texture, which keeps the colors of transparent pixels, or null without WebGL. */
function webGLReader() {
  const gl = webGLReader.context?.isContextLost() === false
    ? webGLReader.context : new OffscreenCanvas(1, 1).getContext("webgl2");
  if (!gl) return null;
  webGLReader.context = gl;
  gl.pixelStorei(gl.UNPACK_PREMULTIPLY_ALPHA_WEBGL, false);
  gl.pixelStorei(gl.UNPACK_COLORSPACE_CONVERSION_WEBGL, gl.NONE);
  return {
    keepsTransparent: true,
    read(bitmap, left, top, width, height) {
      const texture = gl.createTexture();
      const framebuffer = gl.createFramebuffer();
      gl.bindTexture(gl.TEXTURE_2D, texture);
      gl.pixelStorei(gl.UNPACK_SKIP_PIXELS, left);
      gl.pixelStorei(gl.UNPACK_SKIP_ROWS, top);
      gl.texImage2D(gl.TEXTURE_2D, 0, gl.RGBA, width, height, 0, gl.RGBA, gl.UNSIGNED_BYTE, bitmap);
      gl.bindFramebuffer(gl.FRAMEBUFFER, framebuffer);
      gl.framebufferTexture2D(gl.FRAMEBUFFER, gl.COLOR_ATTACHMENT0, gl.TEXTURE_2D, texture, 0);
      const rgba = new Uint8Array(4 * width * height);
      gl.readPixels(0, 0, width, height, gl.RGBA, gl.UNSIGNED_BYTE, rgba);
      gl.deleteFramebuffer(framebuffer);
      gl.deleteTexture(texture);
      if (gl.getError() !== gl.NO_ERROR || gl.isContextLost()) {
        throw new ImageError("does not fit into the graphics card's memory: close other pages, or make it smaller.");
      }
      return rgba;
    },
  };
}

/** A reader through a canvas, which loses the colors of transparent pixels. */
function canvasReader() {
  return {
    keepsTransparent: false,
    read(bitmap, left, top, width, height) {
      const context = new OffscreenCanvas(width, height).getContext("2d", {willReadFrequently: true});
      context.drawImage(bitmap, -left, -top);
      return context.getImageData(0, 0, width, height).data;
    },
  };
}
