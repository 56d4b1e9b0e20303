"use strict";
// A photo from the camera: with a preview in a dialog, or by the device's own camera program where the browser gives no
// access to the camera.

/**
 * @param {(file: File) => void} taken Called with each photo.
 * @param {(message: string) => void} failed Called with what to tell the person.
 */
function setUpCamera(taken, failed) {
  const dialog = document.getElementById("camera-dialog");
  const video = dialog.querySelector("video");
  const shutter = document.getElementById("take-photo");

  document.getElementById("open-camera").addEventListener("click", async () => {
    if (!navigator.mediaDevices?.getUserMedia) {
      document.getElementById("camera-file").click();
      return;
    }
    try {
      video.srcObject = await navigator.mediaDevices.getUserMedia({video: {facingMode: "environment"}});
    } catch (error) {
      failed(error.name === "NotAllowedError"
        ? "The browser does not allow this page to use the camera: allow it in the page's settings, or choose a file."
        : `The camera cannot be used (${error.message}): choose a file.`);
      return;
    }
    dialog.showModal();
  });

  shutter.addEventListener("click", async () => {
    const canvas = new OffscreenCanvas(video.videoWidth, video.videoHeight);
    canvas.getContext("2d").drawImage(video, 0, 0);
    const blob = await canvas.convertToBlob({type: "image/png"});
    dialog.close();
    taken(new File([blob], "photo", {type: blob.type}));
  });
  video.addEventListener("loadeddata", () => { shutter.disabled = false; });
  document.getElementById("close-camera").addEventListener("click", () => dialog.close());
  dialog.addEventListener("close", () => {
    for (const track of video.srcObject?.getTracks() ?? []) track.stop();
    video.srcObject = null;
    shutter.disabled = true;
  });
}
