/** Encodes texts as `lp.TextEncoder` does: 0 is padding, 1 an unknown token. */

const PUNCTUATION = /[!"#$%&()*+,\-./:;<=>?@[\\\]^_`{|}~']/g;
const SPACE = /[\t\n\f\r ]+/g;

/** Returns a function from a text to ids. */
export function encoder(tokens, level, length) {
  const ids = new Map(tokens.map((token, i) => [token, i]));
  return text => {
    const parts = split(text, level, ids);
    const found = parts.map(part => ids.get(part) ?? 1).slice(0, length);
    return Int32Array.from({length}, (_, i) => found[i] ?? 0);
  };
}

function split(text, level, ids) {
  text = text.toLowerCase();
  if (level === 'word') text = text.replace(PUNCTUATION, '');
  text = text.replace(SPACE, ' ').replace(/^ | $/g, '');
  if (level === 'word') return text.split(' ').filter(Boolean);
  if (level === 'character') return [...text];
  return text ? bytePairs([...'▁' + text.replaceAll(' ', '▁')], ids) : [];
}

/** Merges the pair of neighbours with the lowest id until none is a token. */
function bytePairs(parts, ids) {
  for (;;) {
    let best = -1;
    let lowest = Infinity;
    for (let i = 0; i + 1 < parts.length; i++) {
      const id = ids.get(parts[i] + parts[i + 1]) ?? Infinity;
      if (id < lowest) [best, lowest] = [i, id];
    }
    if (best < 0) break;
    parts.splice(best, 2, parts[best] + parts[best + 1]);
  }
  const known = parts.map(part => ids.has(part));  // several unknown tokens in turn count as one
  return parts.filter((_, i) => i === 0 || known[i] || known[i - 1]);
}
