/** Shows what a model answers, and asks for the right answer. */

import {make} from './inputs.js';

const SHOWN = 10;  // classes, or values
const percent = value => `${(100 * value).toFixed(1)} %`;

/** Returns an element that shows the values of an output. */
export function answer(output, values, titled) {
  const rows = Array.from(values, (value, i) => ({value, name: nameOf(output, i), i}));
  if (output.kind === 'values') {
    const cells = rows.slice(0, 100).map(row => make('tr', {},
      make('th', {scope: 'row', textContent: rows.length > 1 ? row.name : (titled ? output.title : 'Value')}),
      make('td', {textContent: row.value.toPrecision(5)})));
    const table = make('table', {className: 'scores'}, ...cells);
    if (titled && rows.length > 1) table.createCaption().textContent = output.title;
    return table;
  }
  const best = output.kind === 'classes'
    ? ({i}) => i === values.indexOf(Math.max(...values))
    : ({i}) => values[i] > (output.thresholds[i] ?? 0.5);
  const sorted = output.kind === 'classes' ? rows.sort((a, b) => b.value - a.value) : rows;
  const cells = sorted.slice(0, output.kind === 'classes' ? SHOWN : undefined).map(row => {
    const bar = make('span', {className: 'bar'});
    bar.style.width = percent(row.value).replace(' ', '');
    return make('tr', {className: best(row) ? 'best' : ''},
      make('th', {scope: 'row', textContent: (best(row) ? '✓ ' : '') + row.name}),
      make('td', {}, bar), make('td', {textContent: percent(row.value)}));
  });
  const table = make('table', {className: 'scores'}, ...cells);
  if (titled) table.createCaption().textContent = output.title;
  return table;
}

function nameOf(output, i) {
  return output.labels[i] ?? `${i}`;
}

/** Asks for a label: `element`, `read()` for a number or numbers, and `describe(y)`. */
export function question(output) {
  const count = output.size;
  if (output.kind === 'classes') {
    const names = Array.from({length: count}, (_, i) => nameOf(output, i));
    const options = names.map((textContent, value) => make('option', {textContent, value}));
    const select = make('select', {}, ...options);
    return {
      element: make('label', {}, 'It is ', select),
      read: () => Number(select.value),
      describe: y => names[y],
    };
  }
  if (output.kind === 'labels') {
    const boxes = Array.from({length: count}, () => make('input', {type: 'checkbox'}));
    const labels = boxes.map((box, i) => make('label', {}, box, ' ', nameOf(output, i)));
    return {
      element: make('fieldset', {className: 'choices'},
        make('legend', {textContent: 'What it has'}), ...labels),
      read: () => boxes.map(box => Number(box.checked)),
      describe: y => y.flatMap((on, i) => (on ? [nameOf(output, i)] : [])).join(', ') || 'nothing',
    };
  }
  const fields = Array.from({length: count}, () => make('input', {inputMode: 'decimal'}));
  const labels = fields.map((field, i) => make('label', {}, count > 1 ? `${i + 1} ` : 'It is ', field));
  return {
    element: make('div', {className: 'numbers'}, ...labels),
    read() {
      const found = fields.map(field => (field.value.trim() ? Number(field.value) : NaN));
      if (!found.every(Number.isFinite)) throw new Error('Give the right value as a number.');
      return found;
    },
    describe: y => y.join(', '),
  };
}

/** Draws a quantity after each epoch, values from 0 to `top`. */
export function curve(values, name, top) {
  const [width, height, left, foot] = [320, 110, 44, 18];
  const x = i => left + i * (width - left - 8) / Math.max(values.length - 1, 1);
  const y = value => 8 + (1 - value / top) * (height - foot - 8);
  const points = values.map((value, i) => `${x(i).toFixed(1)},${y(value).toFixed(1)}`).join(' ');
  const shown = value => (top === 1 ? `${100 * value} %` : value.toPrecision(2));
  const svg = document.createElementNS('http://www.w3.org/2000/svg', 'svg');
  svg.setAttribute('viewBox', `0 0 ${width} ${height}`);
  svg.setAttribute('role', 'img');
  svg.setAttribute('aria-label',
    `${name}: from ${values[0].toPrecision(3)} to ${values.at(-1).toPrecision(3)}`);
  for (const value of [0, top / 2, top]) {
    svg.append(
      shape('line', {class: 'axis', x1: left, x2: width - 8, y1: y(value), y2: y(value)}),
      shape('text', {x: left - 6, y: y(value) + 4, 'text-anchor': 'end'}, shown(value)));
  }
  svg.append(
    shape('polyline', {class: 'line', points}),
    shape('text', {x: left, y: height - 3}, `${name} on your examples, by epoch`));
  return svg;
}

function shape(tag, attributes, textContent = '') {
  const element = document.createElementNS('http://www.w3.org/2000/svg', tag);
  Object.entries(attributes).forEach(([name, value]) => element.setAttribute(name, value));
  element.textContent = textContent;
  return element;
}
