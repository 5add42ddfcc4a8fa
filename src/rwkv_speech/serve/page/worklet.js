// Microphone -> 16-bit samples at the browser's own rate, some 20 ms at a time.
const SIZE = 1024;

class Recorder extends AudioWorkletProcessor {
  constructor() {
    super();
    this.samples = new Int16Array(SIZE);
    this.count = 0;
  }

  process([[channel]]) {
    for (const x of channel ?? []) {
      this.samples[this.count++] = Math.max(-1, Math.min(1, x)) * 32767;
      if (this.count === SIZE) {
        this.port.postMessage(this.samples.buffer, [this.samples.buffer]);
        this.samples = new Int16Array(SIZE);
        this.count = 0;
      }
    }
    return true;
  }
}

registerProcessor("recorder", Recorder);
