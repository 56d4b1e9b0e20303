"use strict";
// What the page does: it takes an image, has the model classify it, and shows the result.

const SETTINGS = JSON.parse(document.getElementById("settings").textContent);
const TOP_CLASSES = 5;
const TURNS = {3: "by 180°", 6: "by 90° to the right", 8: "by 90° to the left"};

const element = (id) => document.getElementById(id);
let model = new Model(SETTINGS);
let running = false;
let next = null; // the newest image, while another one is classified

async function start() {
  say("Loading the model …");
  try {
    await model.ready;
    if (!running && !next) say("Ready for an image.");
  } catch (error) {
    fail(`The model could not be loaded (${error.message}). Try a newer version of this browser, or another one.`);
  }
}

/** Classify an image file, or after the one that is being classified, unless a newer one comes. */
async function take(file) {
  next = file;
  if (running) return;
  running = true;
  element("result").setAttribute("aria-busy", "true");
  while (next) {
    const current = next;
    next = null;
    warn("");
    say(`Classifying ${current.name} …`);
    try {
      const result = await model.classify(current);
      if (!next) show(current.name, result);
    } catch (error) {
      if (!next) fail(`${current.name} ${reasonOf(error)}`);
    }
  }
  running = false;
  element("result").removeAttribute("aria-busy");
}

function reasonOf(error) {
  if (error instanceof UnusableImage) return error.message;
  const isMemory = /alloc|memory|out of bounds/i.test(error.message);
  return isMemory ? "needs more memory than this device has: make it smaller."
    : `could not be classified: the model failed (${error.message}).`;
}

function show(name, {width, height, orientation, exact, preview, seen, probabilities, milliseconds}) {
  draw(element("preview"), preview.width, preview.height, (context) => context.drawImage(preview, 0, 0));
  preview.close();
  element("preview").setAttribute("aria-label", `Preview of ${name}`);
  element("preview-size").textContent = `${width.toLocaleString("en")} × ${height.toLocaleString("en")} pixels`;
  const [seenHeight, seenWidth] = SETTINGS.inputSize;
  draw(element("seen"), seenWidth, seenHeight, (context) => context.putImageData(imageData(seen), 0, 0));

  const order = [...probabilities.keys()].sort((a, b) => probabilities[b] - probabilities[a]).slice(0, TOP_CLASSES);
  element("classes").replaceChildren(...order.map((index) => row(SETTINGS.classNames[index], probabilities[index])));
  element("time").textContent = `${milliseconds.toFixed(0)} ms`;
  element("file-name").textContent = name;
  element("notes").textContent = notesOn(orientation, exact);
  element("result").hidden = false;
  say(`${name}: ${SETTINGS.classNames[order[0]]}, ${percent(probabilities[order[0]])}`);
}

function notesOn(orientation, exact) {
  const notes = [];
  if (orientation !== 1) {
    const turn = TURNS[orientation] ?? "and mirrored";
    notes.push(`The file says that its image is to be shown turned ${turn}. The model is given the pixels as they ` +
      "are stored, as in training; if that is on its side, turn the image and save it.");
  }
  if (!exact) notes.push("Without WebGL, the colors of transparent pixels differ from those in training.");
  return notes.join(" ");
}

function draw(canvas, width, height, paint) {
  [canvas.width, canvas.height] = [width, height];
  paint(canvas.getContext("2d"));
}

function imageData(planes) {
  const [height, width] = SETTINGS.inputSize;
  const data = new ImageData(width, height);
  for (let pixel = 0; pixel < width * height; pixel++) {
    for (let color = 0; color < 3; color++) data.data[4 * pixel + color] = planes[color * width * height + pixel];
    data.data[4 * pixel + 3] = 255;
  }
  return data;
}

function row(name, probability) {
  const item = element("class-row").content.firstElementChild.cloneNode(true);
  item.querySelector(".name").textContent = name;
  const value = item.querySelector("data");
  [value.value, value.textContent] = [probability, percent(probability)];
  item.style.setProperty("--share", probability);
  return item;
}

/** Probabilities that would only be rounded to 0 or 100 % are marked with < or >. */
function percent(share) {
  if (share > 0 && share < 0.001) return "< 0.1 %";
  if (share > 0.999 && share < 1) return "> 99.9 %";
  return `${(100 * share).toFixed(1)} %`;
}

function say(text) {
  element("status").textContent = text;
}

function warn(text) {
  element("error").textContent = text;
  element("error").hidden = !text;
}

function fail(text) {
  say("");
  warn(text);
}

/** Take the first of dropped, pasted or chosen files. */
function takeFirst(files, otherwise) {
  if (!files.length) return otherwise && fail(otherwise);
  take(files[0]);
}

function setUpFiles() {
  element("choose").addEventListener("click", () => element("file").click());
  for (const input of [element("file"), element("camera-file")]) {
    input.addEventListener("change", () => {
      takeFirst([...input.files]);
      input.value = ""; // so that the same file can be chosen again
    });
  }
  document.addEventListener("paste", (event) => {
    takeFirst([...event.clipboardData.files], "What was pasted contains no image: copy an image, not its address.");
  });
  const zone = element("drop-zone");
  const over = (isOver) => zone.classList.toggle("over", isOver);
  document.addEventListener("dragover", (event) => { event.preventDefault(); over(true); });
  document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) over(false); });
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    over(false);
    takeFirst([...event.dataTransfer.files], "What was dropped contains no file: save the image, and drop its file.");
  });
}

function setUpGpu() {
  const choice = element("gpu");
  if (!choice) return;
  choice.disabled = !navigator.gpu;
  element("no-gpu").hidden = Boolean(navigator.gpu);
  choice.addEventListener("change", () => {
    model.stop();
    model = new Model({...SETTINGS, gpu: choice.checked});
    start();
  });
}

setUpFiles();
setUpCamera(take, fail);
setUpGpu();
start();
