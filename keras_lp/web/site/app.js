/** The page: inputs, results, training on the device, rounds with a server. */

import {Client} from './federation.js';
import {make, widget} from './inputs.js';
import {answer, curve, question} from './outputs.js';
import {open} from './runner.js';
import {drop, keep, kept} from './store.js';

const part = id => document.getElementById(id);

/** Runs a task of a button: errors are shown, and other buttons wait. */
async function task(status, work) {
  const buttons = [...document.querySelectorAll('button:not(:disabled)')];
  const focused = document.activeElement;
  buttons.forEach(button => { button.disabled = true; });
  status.classList.remove('error');
  try {
    await work();
  } catch (error) {
    status.textContent = error.message;
    status.classList.add('error');
  } finally {
    buttons.forEach(button => { button.disabled = false; });
    refresh();
    if (document.body.contains(focused)) focused.focus();
  }
}

const config = await (await fetch('model.json')).json();
const widgets = Object.fromEntries(config.inputs.map(input => [input.name, widget(input)]));
const examples = [];
let runner;
let ask;
let accuracies = [];

function readInputs() {
  return Object.fromEntries(Object.entries(widgets).map(([name, one]) => [name, one.read()]));
}

async function showResult() {
  const inputs = readInputs();
  const before = performance.now();
  const found = await runner.run(config.signature, inputs);
  const time = performance.now() - before;
  part('outputs').replaceChildren(
    ...config.outputs.map(output => answer(output, found[output.name], config.outputs.length > 1)));
  part('latency').textContent = `Computed on this device in ${time.toPrecision(2)} ms.`;
  part('result').hidden = false;
}

function showExamples() {
  part('examples').replaceChildren(...examples.map(example => {
    const name = `example ${examples.indexOf(example) + 1}, ${ask.describe(example.y)}`;
    const remove = make('button', {type: 'button', textContent: 'Remove', ariaLabel: `Remove ${name}`});
    remove.disabled = taking;
    remove.addEventListener('click', () => {
      examples.splice(examples.indexOf(example), 1);
      showExamples();
      refresh();
      part('add').focus();
    });
    return make('li', {}, example.preview, make('div', {textContent: ask.describe(example.y)}), remove);
  }));
}

function refresh() {
  part('train').disabled = taking || examples.length === 0;
  part('add').disabled = part('forget').disabled = taking;
  part('join').disabled = !taking && examples.length === 0;
}

async function score() {
  const {accuracy, mae, loss} = await runner.evaluate(examples);
  if (accuracy !== undefined) return ['accuracy', accuracy];
  return mae === undefined ? ['loss', loss] : ['mean absolute error', mae];
}

const shown = (name, value) =>
  (name === 'accuracy' ? `${(100 * value).toFixed(1)} %` : value.toPrecision(3));

async function train() {
  const [name, before] = await score();
  accuracies = accuracies.length ? accuracies : [before];
  await runner.fit(examples, {
    epochs: config.training.epochs,
    onEpoch: async (epoch, loss) => {
      const [, value] = await score();
      accuracies.push(value);
      part('progress').textContent = `Epoch ${epoch + 1} of ${config.training.epochs}, loss `
        + `${loss.toPrecision(3)}, ${name} on your ${examples.length} examples: `
        + `${shown(name, before)} before, ${shown(name, value)} now.`;
      const top = name === 'accuracy' ? 1 : Math.max(...accuracies, 1e-6);
      part('curve').replaceChildren(curve(accuracies, name, top));
    },
  });
  await keep(config.training.model, await runner.weights());
}

async function forget() {
  await drop(config.training.model);
  localStorage.removeItem(place());
  runner = await open(config.file);
  examples.length = 0;
  accuracies = [];
  showExamples();
  part('curve').replaceChildren();
  part('progress').textContent = 'Forgotten: your examples, and what was learned from them.';
}

/** Takes part in rounds until the page closes, the server is done, or the user stops. */
async function takePart() {
  const status = part('round');
  const client = await entered();
  while (taking) {
    let wait = 2;
    try {
      const sent = await client.takePart(runner, examples);
      if (sent) {
        await keep(config.training.model, await runner.weights());
        status.textContent = `Round ${sent.round}: trained on ${examples.length} examples, loss `
          + `${sent.loss.toPrecision(3)}, sent.`;
      }
      const now = await client.round();
      if (now.finished) {
        await client.load(runner);
        await keep(config.training.model, await runner.weights());
        status.textContent = `All ${now.rounds} rounds are done. This page has the result.`;
        break;
      }
      if (!now.takes_part) {
        status.textContent = `Round ${now.round} of ${now.rounds}: waiting for other devices.`;
      }
      wait = now.wait;
    } catch (error) {
      if (error.status && error.status < 500 && error.status !== 409 && error.status !== 429) throw error;
      status.textContent = `${error.message} Trying again.`;
      wait = 10;
    }
    await new Promise(resolve => setTimeout(resolve, 1000 * wait));
  }
}

let taking = false;

/** Returns the client of this device; its token comes from the link (`#token=...`) or the server. */
async function entered() {
  const token = new URLSearchParams(location.hash.slice(1)).get('token') ?? localStorage.getItem(place());
  const known = token && await new Client(token).round().then(() => true, error => error.status !== 401);
  const client = known ? new Client(token) : await Client.join();
  localStorage.setItem(place(), client.token);
  return client;
}

const place = () => `keras_lp token ${config.training.model}`;

async function start() {
  const status = part('status');
  part('widgets').replaceChildren(...Object.values(widgets).map(one => one.element));
  runner = await open(config.file);
  let pending = null;
  const soon = () => {  // results follow the input
    clearTimeout(pending);
    pending = setTimeout(() => showResult().catch(() => {}), 100);
  };
  part('widgets').addEventListener('input', soon);
  part('widgets').addEventListener('change', soon);
  part('run').addEventListener('click', () => task(status, async () => {
    await showResult();
    status.textContent = '';
  }));
  part('clear').addEventListener('click', () => {
    Object.values(widgets).forEach(one => one.clear());
    part('result').hidden = true;
  });
  if (config.training) await startTraining();
  part('input').hidden = false;
  if (status.textContent.startsWith('Loading')) status.textContent = '';
  document.documentElement.dataset.ready = 'true';
}

async function startTraining() {
  const status = part('progress');
  const [output] = config.outputs;
  ask = question({...output, kind: config.training.classes ? 'classes' : output.kind});
  part('label').replaceChildren(ask.element);
  const stored = await kept(config.training.model).catch(() => undefined);
  if (stored) {
    await runner.setWeights(stored);
    status.textContent = 'This model has what it learned here before.';
  }
  part('add').addEventListener('click', () => task(status, async () => {
    const [first] = Object.values(widgets);
    examples.push({inputs: readInputs(), y: ask.read(), preview: first.preview()});
    status.textContent = '';
    accuracies = [];
    showExamples();
    Object.values(widgets).forEach(one => one.clear());
  }));
  part('train').addEventListener('click', () => task(status, async () => {
    await train();
    await showResult().catch(() => {});
  }));
  part('forget').addEventListener('click', () => task(status, forget));
  part('training').hidden = false;
  if (!config.server) return;
  part('together').hidden = false;
  part('join').addEventListener('click', async () => {
    if (taking) {
      taking = false;
      return;
    }
    taking = true;
    part('join').textContent = 'Stop taking part';
    showExamples();
    refresh();
    await takePart().catch(error => { part('round').textContent = error.message; });
    taking = false;
    part('join').textContent = 'Take part';
    showExamples();
    refresh();
  });
}

await start().catch(error => {
  part('status').textContent = `The model cannot be used here: ${error.message}`;
  part('status').classList.add('error');
});
