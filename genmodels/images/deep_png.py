"""PNGs of 16 bits a channel, looked through before a decoder in C sees them.

Reference: the PNG specification, third edition, W3C 2025: chunks, filters, interlacing.
"""

import struct
import zlib

SIGNATURE = b"\x89PNG\r\n\x1a\n"
CHANNELS = {0: 1, 2: 3, 4: 2, 6: 4}  # of a colour type; 3, a palette, has no 16 bits
# Of Adam7's seven passes: first column and row, steps between columns and rows.
PASSES = (
    *((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4)),
    *((0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)),
)


def checked(data: bytes, most: float) -> bytes:
    """Return a PNG of 16 bits as its header and pixels alone, all of it right.

    Checksums, the sizes of chunks, the length of the pixels unpacked and every row's filter are as
    the specification has them. Palettes, texts and colour profiles are left out.

    Args:
        data: the file.
        most: pixels that it may have.

    Raises:
        ValueError: anything is wrong; nothing has been unpacked beyond what the header promises.
    """
    if data[:8] != SIGNATURE:
        raise ValueError("no PNG")
    header, pixels, place, kind = b"", [], 8, b""
    while kind != b"IEND":
        start = data[place : place + 8]
        if len(start) < 8:
            raise ValueError("it ends before its last chunk")
        (length,), kind = struct.unpack(">I", start[:4]), start[4:]
        content = data[place + 8 : place + 8 + length]
        end = data[place + 8 + length : place + 12 + length]
        if len(content) < length or end != struct.pack(">I", zlib.crc32(kind + content)):
            raise ValueError(f"its chunk {ascii(kind)[2:-1]} is damaged")
        place += 12 + length
        if (kind == b"IHDR") == bool(header):
            raise ValueError("its header is missing, or there are two")
        if kind == b"IHDR":
            header = content
        elif kind == b"IDAT":
            pixels.append(content)
    sizes = _row_sizes(header, most)
    packed = b"".join(pixels)
    unpack = zlib.decompressobj()
    rows = unpack.decompress(packed, sum(sizes) + 1)
    if len(rows) != sum(sizes) or not unpack.eof:
        raise ValueError(f"its pixels are not the {sum(sizes)} bytes that its header promises")
    place = 0
    for size in sizes:
        if rows[place] > 4:
            raise ValueError(f"a row has the filter {rows[place]}")
        place += size
    chunks = ((b"IHDR", header), (b"IDAT", packed), (b"IEND", b""))
    return SIGNATURE + b"".join(_chunk(kind, content) for kind, content in chunks)


def _chunk(kind: bytes, content: bytes) -> bytes:
    return (
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
    )


def _row_sizes(header: bytes, most: float) -> list[int]:
    """Return the bytes of each row as stored, its filter among them."""
    if len(header) != 13:
        raise ValueError("its header has another length than 13")
    width, height, depth, colour, *methods = struct.unpack(">IIBBBBB", header)
    if depth != 16 or colour not in CHANNELS or methods[:2] != [0, 0] or methods[2] > 1:
        raise ValueError("its header is of no PNG of 16 bits")
    if not 0 < width * height <= most:
        raise ValueError(f"it has {width} x {height} pixels")
    bytes_of = 2 * CHANNELS[colour]
    if not methods[2]:
        return [1 + width * bytes_of] * height
    sizes = []
    for left, top, across, down in PASSES:
        columns, rows = -(-(width - left) // across), -(-(height - top) // down)
        if columns > 0 and rows > 0:
            sizes += [1 + columns * bytes_of] * rows
    return sizes
