"use strict";
// The model's thread, seen from the page: it is loaded, given the newest image, and started again after a failure.

/** An image that cannot be classified; the model is still usable. The message continues a sentence about the image. */
class UnusableImage extends Error {}

const LARGE = 16e6; // pixels

class Model {
  /**
   * @param {object} settings The model's, with `gpu`.
   */
  constructor(settings) {
    this.settings = settings;
    this.start();
  }

  /** Start the thread. `ready` is a promise that is rejected with an Error if the model cannot be loaded. */
  start() {
    this.worker = new Worker(URL.createObjectURL(FILES.get("worker.js")));
    this.worker.onmessage = ({data}) => this.answered(data);
    this.worker.onerror = (event) => {
      event.preventDefault();
      this.answered({answer: "error", message: event.message || "its thread could not be started"});
    };
    this.ready = this.ask({request: "load", files: FILES, settings: this.settings});
    this.ready.catch(() => {}); // whoever awaits it sees the error
  }

  /**
   * @param {Blob} file
   * @returns {Promise<object>} What `classify` in worker.js returns.
   */
  async classify(file) {
    await this.ready;
    try {
      const result = await this.ask({request: "classify", file});
      if (result.width * result.height > LARGE) this.restart(); // its memory would stay as large
      return result;
    } catch (error) {
      if (!(error instanceof UnusableImage)) this.restart(); // memory that ran out stays so
      throw error;
    }
  }

  restart() {
    this.stop();
    this.start();
  }

  /** End the thread, also while it computes. */
  stop() {
    this.worker.terminate();
    this.pending.reject(new UnusableImage("was not classified, because the model was changed: choose it again."));
  }

  ask(message) {
    return new Promise((resolve, reject) => {
      this.pending = {resolve, reject};
      this.worker.postMessage(message);
    });
  }

  answered({answer, ...values}) {
    const {resolve, reject} = this.pending;
    if (answer !== "error") resolve(values);
    else reject(values.isImage ? new UnusableImage(values.message) : new Error(values.message));
  }
}
