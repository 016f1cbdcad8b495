/** Reads and writes `.npz` files: zip archives, here without compression, of NumPy arrays. */

const TYPES = {'<f4': Float32Array, '<i4': Int32Array};
const CRCS = Uint32Array.from({length: 256}, (_, n) => {
  for (let k = 0; k < 8; k++) n = n & 1 ? 0xedb88320 ^ (n >>> 1) : n >>> 1;
  return n;
});

function crc32(bytes) {
  let crc = -1;
  for (const byte of bytes) crc = CRCS[(crc ^ byte) & 255] ^ (crc >>> 8);
  return (crc ^ -1) >>> 0;
}

/** Returns the bytes of typed arrays by name, with their shapes. */
export function writeNpz(arrays, shapes) {
  const parts = [];
  const directory = [];
  let offset = 0;
  for (const [name, array] of Object.entries(arrays)) {
    const file = new TextEncoder().encode(`${name}.npy`);
    const content = npy(array, shapes[name]);
    const common = [20, 0, 0, 0, 0x21, crc32(content), content.length, content.length, file.length, 0];
    const widths = [2, 2, 2, 2, 2, 4, 4, 4, 2, 2];
    const local = packed([0x04034b50, ...common], [4, ...widths]);
    parts.push(local, file, content);
    directory.push(
      packed([0x02014b50, 20, ...common, 0, 0, 0, 0, offset], [4, 2, ...widths, 2, 2, 2, 4, 4]), file);
    offset += local.length + file.length + content.length;
  }
  const size = directory.reduce((sum, part) => sum + part.length, 0);
  const count = directory.length / 2;
  const end = packed([0x06054b50, 0, 0, count, count, size, offset, 0], [4, 2, 2, 2, 2, 4, 4, 2]);
  return new Blob([...parts, ...directory, end]).arrayBuffer().then(buffer => new Uint8Array(buffer));
}

function npy(array, shape) {
  const descr = array instanceof Int32Array ? '<i4' : '<f4';
  const comma = shape.length === 1 ? ',' : '';
  const text = `{'descr': '${descr}', 'fortran_order': False, 'shape': (${shape.join(', ')}${comma}), }`;
  const length = Math.ceil((text.length + 11) / 64) * 64;
  const content = new Uint8Array(length + array.byteLength);
  content.set([0x93, ...[...'NUMPY'].map(letter => letter.charCodeAt(0)), 1, 0]);
  content.set(packed([length - 10], [2]), 8);
  content.set(new TextEncoder().encode(text.padEnd(length - 11) + '\n'), 10);
  content.set(new Uint8Array(array.buffer, array.byteOffset, array.byteLength), length);
  return content;
}

function packed(numbers, widths) {
  const bytes = [];
  numbers.forEach((number, i) => {
    for (let k = 0; k < widths[i]; k++) bytes.push(Math.floor(number / 256 ** k) & 255);
  });
  return Uint8Array.from(bytes);
}

/** Returns the typed arrays of a file by name. */
export function readNpz(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const end = bytes.length - 22;  // without a comment
  if (end < 0 || view.getUint32(end, true) !== 0x06054b50) throw new Error('not an .npz file');
  let place = view.getUint32(end + 16, true);
  const arrays = {};
  for (let i = 0; i < view.getUint16(end + 10, true); i++) {
    const [method, size] = [view.getUint16(place + 10, true), view.getUint32(place + 20, true)];
    const lengths = [28, 30, 32].map(at => view.getUint16(place + at, true));
    const local = view.getUint32(place + 42, true);
    const name = new TextDecoder().decode(bytes.subarray(place + 46, place + 46 + lengths[0]));
    if (method !== 0) throw new Error(`${name} is compressed`);
    const start = local + 30 + view.getUint16(local + 26, true) + view.getUint16(local + 28, true);
    arrays[name.replace(/\.npy$/, '')] = readNpy(bytes.slice(start, start + size), name);
    place += 46 + lengths[0] + lengths[1] + lengths[2];
  }
  return arrays;
}

function readNpy(bytes, name) {
  const length = bytes[8] + 256 * bytes[9];
  const header = new TextDecoder().decode(bytes.subarray(10, 10 + length));
  const type = TYPES[/'descr': '([^']*)'/.exec(header)?.[1]];
  if (bytes[6] !== 1 || !type || header.includes('True')) throw new Error(`${name} has another type`);
  return new type(bytes.slice(10 + length).buffer);
}
