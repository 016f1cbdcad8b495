/** Ways to give an input: a drawing, a picture, a text, numbers. */

import {encoder} from './text.js';

const ARRAYS = {float32: Float32Array, int32: Int32Array, uint8: Uint8Array};
const INK = 256;  // width and height of the drawing area

/**
 * Returns the widget of an input: `element`; `read()`, a typed array (or an error that says what is
 * missing); `preview()`, what an example looks like in a list; and `clear()`.
 */
export function widget(input) {
  const kinds = {drawing, picture, text, numbers};
  return kinds[input.kind](input);
}

/** Makes an element with properties and children. */
export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

function titled(input, ...children) {
  return make('fieldset', {}, make('legend', {textContent: input.title}), ...children);
}

/** Returns the numbers of pixels with values from 0 to 255 in 4 channels. */
function scaled(input, pixels) {
  const [height, width, channels] = input.shape;
  const values = new ARRAYS[input.dtype](height * width * channels);
  for (let i = 0; i < height * width; i++) {
    const rgb = pixels.subarray(4 * i, 4 * i + 3);
    const grey = 0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2];
    for (let c = 0; c < channels; c++) {
      const value = channels === 3 ? rgb[c] : grey;
      values[channels * i + c] = (value - input.mean) / input.std;
    }
  }
  return values;
}

function small(input) {
  const [height, width] = input.shape;
  return make('canvas', {width, height});
}

function fromFile(onPicture) {
  const field = make('input', {type: 'file', accept: 'image/*', ariaLabel: 'Picture file'});
  field.addEventListener('change', async () => {
    if (!field.files.length) return;
    try {
      onPicture(await createImageBitmap(field.files[0]));
      field.setCustomValidity('');
    } catch {
      field.setCustomValidity('This file is not a picture that the browser can read.');
      field.reportValidity();
    }
    field.value = '';
  });
  return field;
}

function drawing(input) {
  const area = make('canvas', {
    className: 'draw', width: INK, height: INK, tabIndex: 0,
    ariaLabel: 'Drawing area: draw here, or choose a file below',
  });
  area.setAttribute('role', 'img');
  const pen = area.getContext('2d', {willReadFrequently: true});
  let empty = true;
  const clear = () => {
    pen.fillStyle = '#000';
    pen.fillRect(0, 0, INK, INK);
    empty = true;
  };
  const at = event => {
    const box = area.getBoundingClientRect();
    return [
      (event.clientX - box.left) * INK / box.width, (event.clientY - box.top) * INK / box.height];
  };
  area.addEventListener('pointerdown', event => {
    area.setPointerCapture(event.pointerId);
    Object.assign(pen, {strokeStyle: '#fff', lineWidth: 24, lineCap: 'round', lineJoin: 'round'});
    pen.beginPath();
    pen.moveTo(...at(event));
    pen.lineTo(...at(event));
    pen.stroke();
    empty = false;
  });
  area.addEventListener('pointermove', event => {
    if (!event.buttons) return;
    pen.lineTo(...at(event));
    pen.stroke();
    area.dispatchEvent(new Event('input', {bubbles: true}));
  });
  const file = fromFile(picture => {
    clear();
    pen.drawImage(picture, 0, 0, INK, INK);
    empty = false;
    area.dispatchEvent(new Event('change', {bubbles: true}));
  });
  clear();
  const fitted = () => fit(input, pen.getImageData(0, 0, INK, INK).data);
  return {
    element: titled(input, area, file),
    clear,
    read() {
      if (empty) throw new Error('Draw something first.');
      return scaled(input, fitted());
    },
    preview() {
      const canvas = small(input);
      canvas.getContext('2d').putImageData(new ImageData(fitted(), canvas.width), 0, 0);
      return canvas;
    },
  };
}

/** Scales what was drawn to the size of the input, centred; tiny inputs are filled to the edge. */
function fit(input, ink) {
  const [height, width] = input.shape;
  let [left, top, right, bottom] = [INK, INK, 0, 0];
  for (let y = 0; y < INK; y++) {
    for (let x = 0; x < INK; x++) {
      if (ink[4 * (y * INK + x)] < 32) continue;
      [left, right] = [Math.min(left, x), Math.max(right, x + 1)];
      [top, bottom] = [Math.min(top, y), Math.max(bottom, y + 1)];
    }
  }
  const filled = height <= 16 ? 1 : 20 / 28;  // as in the digits of scikit-learn, and of MNIST
  const side = Math.max(right - left, bottom - top, 1) / filled;
  const [x0, y0] = [(left + right - side) / 2, (top + bottom - side) / 2];
  const pixels = new Uint8ClampedArray(4 * height * width).fill(255);
  const samples = 8;  // in each direction, for the mean of a pixel
  for (let i = 0; i < height * width; i++) {
    let sum = 0;
    for (let s = 0; s < samples * samples; s++) {
      const u = (i % width + (s % samples + 0.5) / samples) / width;
      const v = (Math.floor(i / width) + (Math.floor(s / samples) + 0.5) / samples) / height;
      const [x, y] = [Math.floor(x0 + u * side), Math.floor(y0 + v * side)];
      if (x >= 0 && x < INK && y >= 0 && y < INK) sum += ink[4 * (y * INK + x)];
    }
    pixels.fill(sum / samples ** 2, 4 * i, 4 * i + 3);
  }
  return pixels;
}

function picture(input) {
  const shot = make('canvas', {className: 'shot', hidden: true, ariaLabel: 'The picture'});
  const video = make('video', {playsInline: true, muted: true, hidden: true});
  const exact = small(input);
  const brush = exact.getContext('2d', {willReadFrequently: true});
  brush.imageSmoothingQuality = 'high';
  let stream = null;
  let empty = true;
  const stop = () => {
    stream?.getTracks().forEach(track => track.stop());
    stream = null;
    video.hidden = true;
    button.textContent = 'Use the camera';
  };
  const take = (source, width, height) => {
    brush.drawImage(source, 0, 0, exact.width, exact.height);
    Object.assign(shot, {width, height, hidden: false});
    shot.getContext('2d').drawImage(source, 0, 0, width, height);
    empty = false;
    shot.dispatchEvent(new Event('change', {bubbles: true}));
  };
  const file = fromFile(image => {
    stop();
    take(image, image.width, image.height);
  });
  const button = make('button', {type: 'button', textContent: 'Use the camera'});
  const message = make('p', {className: 'quiet'});
  button.addEventListener('click', async () => {
    if (stream) {
      take(video, video.videoWidth, video.videoHeight);
      stop();
      return;
    }
    try {
      stream = await navigator.mediaDevices.getUserMedia({video: {facingMode: 'environment'}});
      video.srcObject = stream;
      await video.play();
      Object.assign(video, {hidden: false});
      shot.hidden = true;
      button.textContent = 'Take the picture';
      message.textContent = '';
    } catch (error) {
      message.textContent = navigator.mediaDevices
        ? `The camera cannot be used: ${error.message}` : 'The camera needs a page over HTTPS.';
    }
  });
  return {
    element: titled(input, video, shot, make('p', {className: 'buttons'}, button, file), message),
    clear() {
      stop();
      shot.hidden = true;
      empty = true;
    },
    read() {
      if (empty) throw new Error('Choose or take a picture first.');
      return scaled(input, brush.getImageData(0, 0, exact.width, exact.height).data);
    },
    preview() {
      const canvas = small(input);
      canvas.getContext('2d').drawImage(exact, 0, 0);
      return canvas;
    },
  };
}

function text(input) {
  const field = make('textarea', {ariaLabel: input.title});
  const encode = encoder(input.tokens, input.level, input.shape[0]);
  return {
    element: titled(input, field),
    clear: () => { field.value = ''; },
    read() {
      if (!field.value.trim()) throw new Error('Type a text first.');
      return ARRAYS[input.dtype].from(encode(field.value));
    },
    preview: () => shortened(field.value),
  };
}

function shortened(value) {
  return value.length > 60 ? `${value.slice(0, 57)}...` : value;
}

function numbers(input) {
  const size = input.shape.reduce((product, length) => product * length, 1);
  const fields = size <= 64 ? tableOfNumbers(input, size) : listOfNumbers(input, size);
  return {
    ...fields,
    read() {
      const found = fields.texts();
      const values = found.map(value => (value === '' ? NaN : Number(value)));
      const wrong = found.find((value, i) => value && !Number.isFinite(values[i]));
      if (wrong) throw new Error(`Give numbers: "${shortened(wrong)}" is not one.`);
      const count = values.filter(Number.isFinite).length;
      if (values.length !== size || count !== size) {
        throw new Error(`Give ${size} numbers: there are ${count}.`);
      }
      const most = input.ids ?? Infinity;
      const outside = values.find(value => input.dtype !== 'float32'
        && !(Number.isInteger(value) && value >= 0 && value < most));
      if (outside !== undefined) {
        throw new Error(`Give whole numbers from 0${input.ids ? ` to ${most - 1}` : ''}: `
          + `${outside} is not one.`);
      }
      return ARRAYS[input.dtype].from(values);
    },
    preview: () => shortened(fields.texts().join(' ')),
  };
}

function tableOfNumbers(input, size) {
  const fields = Array.from({length: size}, () => make('input', {inputMode: 'decimal'}));
  fields.forEach((field, i) => field.addEventListener('paste', event => {
    const pasted = parts(event.clipboardData.getData('text'));
    if (pasted.length < 2) return;
    event.preventDefault();
    pasted.slice(0, size - i).forEach((value, k) => { fields[i + k].value = value; });
    field.dispatchEvent(new Event('change', {bubbles: true}));
  }));
  const labels = fields.map((field, i) => make('label', {}, input.features?.[i] ?? `${i + 1}`, field));
  return {
    element: titled(input, make('div', {className: 'numbers'}, ...labels)),
    clear: () => fields.forEach(field => { field.value = ''; }),
    texts: () => fields.map(field => field.value.trim().replace(/^(-?\d+),(\d+)$/, '$1.$2')),
  };
}

function listOfNumbers(input, size) {
  const field = make('textarea', {
    ariaLabel: input.title, placeholder: `${size} numbers, separated by spaces or commas`});
  return {
    element: titled(input, field),
    clear: () => { field.value = ''; },
    texts: () => parts(field.value),
  };
}

const parts = value => value.split(/[\s,;]+/).filter(Boolean);
