/** Runs and trains a file in LiteRT.js, with the calls of `lp.DeviceTrainer`. */

import {Tensor, loadAndCompile, loadLiteRt} from '@litertjs/core';

const ARRAYS = {float32: Float32Array, int32: Int32Array, uint8: Uint8Array};

let loading;

/** Opens a `.tflite` file at an address. */
export async function open(address) {
  loading ??= loadLiteRt('litert/wasm/');
  const [response] = await Promise.all([fetch(address), loading]);
  if (!response.ok) throw new Error(`${address} cannot be loaded (${response.status}).`);
  const content = new Uint8Array(await response.arrayBuffer());
  return new Runner(await loadAndCompile(content, {accelerator: 'wasm'}));
}

/** A file. Inputs and outputs are typed arrays by name. */
export class Runner {
  #model;
  #last = Promise.resolve();

  constructor(model) {
    this.#model = model;
    const train = model.signatures.train;
    this.trainInputs = train && Object.fromEntries(train.getInputDetails().map(i => [i.name, i]));
    this.batchSize = train && Number(this.trainInputs.mask.shape[0]);
  }

  /** Whether the file has a signature. */
  has(signature) {
    return signature in this.#model.signatures;
  }

  /** Calls a signature. Calls wait for each other: the runtime has one state. */
  run(signature, inputs) {
    const call = this.#last.then(() => this.#call(this.#model.signatures[signature], inputs));
    this.#last = call.catch(() => {});
    return call;
  }

  async #call(runner, inputs) {
    const given = {};
    let found = {};
    try {
      for (const {name, dtype, shape} of runner.getInputDetails()) {
        given[name] = new Tensor(ARRAYS[dtype].from(inputs[name]), Array.from(shape, Number));
      }
      found = await runner.run(given);
      const outputs = {};
      for (const [name, tensor] of Object.entries(found)) {
        outputs[name] = (await tensor.data()).slice();
      }
      return outputs;
    } finally {
      for (const tensor of [...Object.values(given), ...Object.values(found)]) tensor.delete();
    }
  }

  /**
   * Trains; returns the mean loss of each epoch. Examples are `{inputs, y}`: typed arrays by name of
   * the input, and a number or an array of numbers. The frozen part runs once per example.
   */
  async fit(examples, {epochs = 1, shuffle = true, onEpoch = () => {}} = {}) {
    let signature = 'train';
    if (this.has('features')) {
      signature = 'train_features';
      const computed = [];
      for (const {inputs, y} of examples) {
        computed.push({inputs: await this.run('features', inputs), y});
        await breathe();
      }
      examples = computed;
    }
    const losses = [];
    for (let epoch = 0; epoch < epochs; epoch++) {
      const order = shuffle ? shuffled(examples) : examples;
      losses.push((await this.#means(signature, order)).loss);
      await onEpoch(epoch, losses.at(-1));
    }
    return losses;
  }

  /** Returns the loss, and the accuracy or mean absolute error, on examples as in `fit`. */
  evaluate(examples) {
    return this.#means('evaluate', examples);
  }

  async #means(signature, examples) {
    const sums = {};
    for (let first = 0; first < examples.length; first += this.batchSize) {
      const found = await this.run(signature, this.#batch(examples.slice(first, first + this.batchSize)));
      // LiteRT.js gives equal outputs under one of their names.
      const {loss_weight: ofLoss, count, ...values} = found;
      for (const [name, [value]] of Object.entries(values)) {
        const [weight] = name === 'loss' ? ofLoss ?? count : count ?? ofLoss;
        const sum = (sums[name] ??= {total: 0, weight: 0});
        sum.total += value * weight;
        sum.weight += weight;
      }
      await breathe();
    }
    return Object.fromEntries(
      Object.entries(sums).map(([name, {total, weight}]) => [name, weight ? total / weight : NaN]));
  }

  /** A batch of fixed size: missing rows repeat examples and do not count. */
  #batch(examples) {
    const size = this.batchSize;
    const rows = Array.from({length: size}, (_, i) => examples[i % examples.length]);
    const batch = {mask: Float32Array.from(rows, (_, i) => (i < examples.length ? 1 : 0))};
    for (const name of Object.keys(rows[0].inputs)) {
      batch[name] = joined(rows.map(row => row.inputs[name]));
    }
    batch.y = joined(rows.map(row => (typeof row.y === 'number' ? [row.y] : row.y)));
    return batch;
  }

  /** Returns the trained weights and the `version`, typed arrays by name. */
  weights() {
    return this.run('read_weights', {ignored: [0]});
  }

  /** Sets weights from `weights` or a server, and resets the optimizer. */
  async setWeights(given) {
    const own = await this.weights();
    for (const [name, value] of Object.entries(own)) {
      if (given[name]?.length !== value.length || !given[name].every(Number.isFinite)) {
        throw new Error(`These weights do not fit the model: ${name}.`);
      }
    }
    const half = own.version.length / 2;  // the first identifies the model, the second the round
    if (!own.version.slice(0, half).every((number, i) => number === given.version[i])) {
      throw new Error('These weights are from another model.');
    }
    await this.run('set_weights', given);
  }

  /** The shapes of the weights by name. */
  shapes() {
    const details = this.#model.signatures.set_weights.getInputDetails();
    return Object.fromEntries(details.map(({name, shape}) => [name, Array.from(shape, Number)]));
  }
}

function joined(arrays) {
  const all = new (arrays[0].constructor === Array ? Float32Array : arrays[0].constructor)(
    arrays.length * arrays[0].length);
  arrays.forEach((array, i) => all.set(array, i * array.length));
  return all;
}

function shuffled(items) {
  const order = [...items];
  for (let i = order.length - 1; i > 0; i--) {
    const j = Math.floor(Math.random() * (i + 1));
    [order[i], order[j]] = [order[j], order[i]];
  }
  return order;
}

let painted = 0;

/** Lets the page paint and react during a long computation. */
async function breathe() {
  if (performance.now() - painted < 30) return;
  await new Promise(resolve => setTimeout(resolve));
  painted = performance.now();
}
