"use strict";
// The model, in a thread of its own, so that the page stays usable while it computes. It is given images one at a time.

const PREVIEW = 640; // longest side of the preview, in pixels

let settings, resizer, classifier, Tensor;

self.onmessage = async ({data}) => {
  const {request, ...values} = data;
  try {
    if (request === "load") {
      await load(values);
      self.postMessage({answer: "ready"});
    } else {
      const result = await classify(values.file);
      self.postMessage({answer: "result", ...result}, [result.seen.buffer, result.preview]);
    }
  } catch (error) {
    const forPerson = error instanceof ImageError;
    self.postMessage({answer: "error", message: error.message ?? String(error), isImage: forPerson});
  }
};

/**
 * @param {{files: Map<string, Blob>, settings: object}} values The page's files, and the model's settings, with `gpu`
 *     for WebGPU.
 */
async function load({files, settings: given}) {
  settings = given;
  const cpu = await runtime(files, "ort");
  Tensor = cpu.Tensor;
  resizer = await session(cpu, files.get("resizer.onnx"), "wasm"); // the GPU's runtime has no float64
  classifier = settings.gpu
    ? await session(await runtime(files, "ort-gpu"), files.get("model.onnx"), "webgpu")
    : await session(cpu, files.get("model.onnx"), "wasm");
}

/** onnxruntime-web, by its text: a page that was opened from a disk may not import modules at blob: addresses. */
async function runtime(files, name) {
  const ort = await import(`data:text/javascript,${encodeURIComponent(await files.get(`${name}.mjs`).text())}`);
  ort.env.wasm.numThreads = 1; // more need headers that a file or a simple server does not send
  ort.env.wasm.wasmBinary = await files.get(`${name}.wasm`).arrayBuffer();
  ort.env.logLevel = "error";
  return ort;
}

async function session(ort, model, provider) {
  return ort.InferenceSession.create(new Uint8Array(await model.arrayBuffer()), {executionProviders: [provider]});
}

/** Decode, resize and classify an image file. */
async function classify(file) {
  const {bitmap, orientation} = await decode(file);
  const {width, height} = bitmap;
  const {planes, exact} = pixelsOf(bitmap);
  const scale = Math.min(1, PREVIEW / Math.max(width, height));
  const [resizeWidth, resizeHeight] = [width, height].map((side) => Math.max(1, Math.round(scale * side)));
  const preview = await createImageBitmap(bitmap, {resizeWidth, resizeHeight, resizeQuality: "high"});
  bitmap.close();

  const image = new Tensor("uint8", planes, [1, 3, height, width]);
  const {seen} = await resizer.run({images: image});
  const given = asInput(settings.resizesItself ? image : seen);
  const start = performance.now();
  const {[classifier.outputNames[0]]: output} = await classifier.run({[classifier.inputNames[0]]: given});
  const milliseconds = performance.now() - start;
  const probabilities = settings.output === "logits" ? softmax(output.data) : Float32Array.from(output.data);
  if (!probabilities.every(Number.isFinite)) throw new ImageError("makes the model's output not finite.");
  return {width, height, orientation, exact, preview, seen: Uint8Array.from(seen.data), probabilities, milliseconds};
}

/** The model's input: the pixels as they are, or from 0 to 1. */
function asInput(pixels) {
  if (settings.inputType === "uint8") return pixels;
  return new Tensor("float32", Float32Array.from(pixels.data, (value) => value / 255), pixels.dims);
}

function softmax(logits) {
  const largest = logits.reduce((most, value) => Math.max(most, value));
  const powers = Float64Array.from(logits, (value) => Math.exp(value - largest));
  const sum = powers.reduce((total, value) => total + value);
  return Float32Array.from(powers, (value) => value / sum);
}
