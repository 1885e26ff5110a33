"""Faults that are put into files: what the tests of reliability share."""

import random
import zipfile


def flip(path, bit):
    """Turn one bit of a file, a number from 0 to 8 times its bytes."""
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.unlink()  # a checkpoint of a step and the last one are the same file
    path.write_bytes(data)


def cut(path, size):
    """Leave a file the first bytes alone."""
    data = path.read_bytes()[:size]
    path.unlink()
    path.write_bytes(data)


def _bytes_of_records(path):
    """Return the spans of what a zip's records hold, without what zip says of them."""
    data, spans = path.read_bytes(), []
    with zipfile.ZipFile(path) as archive:
        for record in archive.infolist():
            begin = record.header_offset
            names = data[begin + 26 : begin + 28], data[begin + 28 : begin + 30]
            start = begin + 30 + sum(int.from_bytes(size, "little") for size in names)
            spans.append(range(start, start + record.compress_size))
    return len(data), spans


def bits_of_records(path, number, seed):
    """Return random bits of what the records of a zip hold."""
    _, spans = _bytes_of_records(path)
    inside = [position for span in spans for position in span]
    chance = random.Random(seed)
    return [8 * position + chance.randrange(8) for position in chance.sample(inside, number)]


def bits_of_the_rest(path, number, seed):
    """Return random bits of a zip's names, sizes, dates and gaps."""
    size, spans = _bytes_of_records(path)
    outside = sorted({*range(size)}.difference(*spans))
    chance = random.Random(seed)
    return [8 * position + chance.randrange(8) for position in chance.sample(outside, number)]
