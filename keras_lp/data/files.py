"""Image and sound files: which are whole, and how they become arrays."""

from __future__ import annotations

import dataclasses
import os
import struct
from typing import Any

import numpy as np
import tensorflow as tf

from keras_lp.data.dataset import resized

IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif")
SOUNDS = (".wav",)
OTHERS = (".webp", ".tif", ".tiff", ".heic", ".mp3", ".flac", ".ogg", ".m4a")  # not read
_PCM = (1, 0xFFFE)  # integers; the second stands for a longer header
_TRAILER = 2**16  # bytes at the end; some cameras append data of their own


def is_whole(path: str) -> bool:
    """Whether a file begins and ends as its format says; it is not decoded."""
    try:
        with open(path, "rb", buffering=0) as file:
            head = file.read(16)
            size = file.seek(0, 2)
            file.seek(max(0, size - _TRAILER))
            tail = file.read()
    except OSError:
        return False
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return b"IEND" in tail
    if head.startswith(b"\xff\xd8\xff"):
        return b"\xff\xd9" in tail
    if head.startswith((b"GIF87a", b"GIF89a")):
        return tail.rstrip(b"\0").endswith(b";")
    if head.startswith(b"BM"):
        return size >= struct.unpack("<I", head[2:6])[0] > 0
    if head.startswith(b"RIFF") and head[8:12] == b"WAVE":
        return size >= struct.unpack("<I", head[4:8])[0] + 8 - 1 > 40
    return False


@dataclasses.dataclass(frozen=True)
class Wave:
    """Where the samples of a wav file are.

    Attributes:
        rate: samples per second.
        channels: number of channels.
        start: offset of the samples in bytes.
        size: bytes of the samples.
    """

    rate: int
    channels: int
    start: int
    size: int

    @property
    def samples(self) -> int:
        """The number of samples of each channel."""
        return self.size // (2 * self.channels)


def wave_of(path: str) -> Wave:
    """Returns where the samples of a wav file of 16-bit numbers are.

    Raises:
        ValueError: if it has another encoding.
    """
    encoding = channels = rate = bits = 0
    with open(path, "rb") as file:
        file.read(12)
        while len(chunk := file.read(8)) == 8:
            kind, size = chunk[:4], struct.unpack("<I", chunk[4:])[0]
            if kind == b"fmt ":
                form = file.read(size + size % 2)
                encoding, channels, rate, _, _, bits = struct.unpack("<HHIIHH", form[:16])
            elif kind == b"data" and encoding in _PCM and bits == 16:
                return Wave(rate, channels, file.tell(), size)
            else:
                file.seek(size + size % 2, 1)
    raise ValueError(
        f"A wav file must have uncompressed 16-bit samples. Received: {path} with {bits} bits in "
        f"encoding {encoding}."
    )


def read_images(
    files: list[str], labels: Any, image_size: tuple[int, int], channels: int
) -> tf.data.Dataset:
    """Returns `(image, labels)`: uint8 `(height, width, channels)`."""

    def read(path: Any, label: Any) -> Any:
        image = _decode(tf.io.read_file(path), channels)
        image.set_shape((None, None, channels))
        return resized(image, image_size), label

    dataset = tf.data.Dataset.from_tensor_slices((files, labels))
    return dataset.map(read, num_parallel_calls=tf.data.AUTOTUNE)


def _decode(content: Any, channels: int) -> Any:
    """Returns the pixels of an image; TensorFlow decodes BMP and GIF in colour only."""

    def decode(count: int) -> Any:
        return tf.io.decode_image(content, count, expand_animations=False)

    if channels == 3:
        return decode(3)
    in_colour = tf.strings.regex_full_match(tf.strings.substr(content, 0, 3), "BM.|GIF")
    return tf.cond(in_colour, lambda: tf.image.rgb_to_grayscale(decode(3)), lambda: decode(1))


def read_sounds(files: list[str], waves: list[Wave], labels: Any, samples: int) -> tf.data.Dataset:
    """Returns `(wave, labels)`: float32 `(samples,)` from -1 to 1, the mean over the channels."""

    def read(path: Any, wave: Any, label: Any) -> Any:
        start, size, channels = tf.unstack(wave)
        raw = tf.strings.substr(tf.io.read_file(path), start, size // 2 * 2)
        numbers = tf.cast(tf.io.decode_raw(raw, tf.int16), tf.float32) / 2**15
        numbers = numbers[: tf.size(numbers) // channels * channels]
        mono = tf.reduce_mean(tf.reshape(numbers, (-1, channels)), 1)[:samples]
        mono = tf.pad(mono, [[0, samples - tf.shape(mono)[0]]])
        return tf.ensure_shape(mono, (samples,)), label

    places = [(wave.start, wave.size, wave.channels) for wave in waves]
    dataset = tf.data.Dataset.from_tensor_slices((files, np.array(places, "int32"), labels))
    return dataset.map(read, num_parallel_calls=tf.data.AUTOTUNE)


def common_rate(files: list[str], waves: list[Wave]) -> int:
    """Returns the sample rate of wav files.

    Raises:
        ValueError: if the rates differ.
    """
    rates = {wave.rate: file for wave, file in zip(waves, files, strict=True)}
    if len(rates) > 1:
        some = list(rates.items())[:3]
        shown = ", ".join(f"{os.path.basename(file)}: {rate:,} Hz" for rate, file in some)
        raise ValueError(
            f"The files must have the same sample rate. Received: {shown}. Resample them."
        )
    return next(iter(rates))
