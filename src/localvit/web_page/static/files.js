"use strict";
// The files that the page carries in scripts. A page opened from a disk may not fetch files, but it may load scripts.

/** @type {Map<string, Blob>} */
const FILES = new Map();

/**
 * Called by the scripts that carry files.
 *
 * @param {string} name
 * @param {string[]} parts The contents in base64. Each part is decoded by itself, which needs little memory.
 */
function carry(name, parts) {
  FILES.set(name, new Blob(parts.map(fromBase64), {type: "text/javascript"}));
}

function fromBase64(text) {
  return Uint8Array.fromBase64?.(text) ?? Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
}
