/** Takes part in the rounds of `lp.phone_server`. */

import {readNpz, writeNpz} from './npz.js';

/** A client of the server that serves this page. */
export class Client {
  constructor(token) {
    this.token = token;
  }

  /** Joins, and returns the client; its token is the secret of this device. */
  static async join() {
    return new Client((await (await request('join', {method: 'POST'})).json()).token);
  }

  /** Returns what the server says about the current round. */
  async round() {
    return (await this.#request('round')).json();
  }

  /** Loads the current weights of the server. */
  async load(runner) {
    const weights = await this.#request('weights');
    await runner.setWeights(readNpz(new Uint8Array(await weights.arrayBuffer())));
  }

  /** Trains in the current round and sends what was learned; null if there is nothing to do. */
  async takePart(runner, examples, {shuffle = true} = {}) {
    const {round, finished, takes_part: takesPart, local_epochs: epochs} = await this.round();
    if (finished || !takesPart) return null;
    await this.load(runner);
    const losses = await runner.fit(examples, {epochs, shuffle});
    const body = await writeNpz(await runner.weights(), runner.shapes());
    const path = `update?round=${round}&examples=${examples.length}`;
    await this.#request(path, {method: 'POST', body});
    return {round, loss: losses.at(-1)};
  }

  #request(path, options = {}) {
    return request(path, {...options, headers: {Authorization: `Bearer ${this.token}`}});
  }
}

async function request(path, options) {
  const response = await fetch(path, options);
  if (response.ok) return response;
  const {reason = response.statusText} = await response.json().catch(() => ({}));
  throw Object.assign(new Error(reason), {status: response.status});
}
