"""What an AV1 bitstream will make its decoder do: the largest frame and the number of frames.

Names and order of fields: AV1 Bitstream & Decoding Process Specification, 5.3 and 5.5.
"""

from typing import NamedTuple

from service.errors import BadImage

_SEQUENCE, _FRAME_HEADER, _FRAME = 1, 3, 6


class Coded(NamedTuple):
    """The largest frame of a bitstream, how many frames it has, and how many units of any kind."""

    width: int
    height: int
    frames: int
    units: int


class _Bits:
    """Reads numbers bit by bit; zeros past the end."""

    def __init__(self, data: bytes) -> None:
        self._value, self._left = int.from_bytes(data), 8 * len(data)

    def read(self, count: int) -> int:
        self._left -= count
        return (self._value >> self._left if self._left >= 0 else 0) & (1 << count) - 1

    def read_uvlc(self) -> int:
        zeros = 0
        while zeros < 32 and not self.read(1):
            zeros += 1
        return self.read(zeros) + (1 << zeros) - 1


def scan(data: bytes, max_units: int) -> Coded:
    """Scan a bitstream; sizes are zero if there is no sequence header. Raises BadImage."""
    width = height = frames = at = 0
    for units in range(max_units + 1):
        if at >= len(data):
            return Coded(width, height, frames, units)
        first = data[at]
        kind, at = first >> 3 & 15, at + (2 if first & 4 else 1)
        size = len(data) - at
        if first & 2:
            size = shift = 0
            for _ in range(8):
                byte = data[at] if at < len(data) else 0
                size, shift, at = size | (byte & 127) << shift, shift + 7, at + 1
                if byte < 128:
                    break
        if kind == _SEQUENCE:
            # The fields before the size take up to 350 bytes.
            wide, high = _frame_size(_Bits(data[at : at + min(size, 512)]))
            if wide * high > width * height:
                width, height = wide, high
        frames += kind in (_FRAME, _FRAME_HEADER)
        at += size
    raise BadImage("the image has too many parts: save it as a still picture")


def _frame_size(bits: _Bits) -> tuple[int, int]:
    """max_frame_width and max_frame_height of a sequence header."""
    read = bits.read
    read(3 + 1)  # seq_profile, still_picture
    if read(1):  # reduced_still_picture_header
        read(5)  # seq_level_idx
    else:
        delay_bits = 0
        if read(1):  # timing_info_present_flag
            read(32 + 32)  # num_units_in_display_tick, time_scale
            if read(1):  # equal_picture_interval
                bits.read_uvlc()
            if read(1):  # decoder_model_info_present_flag
                delay_bits = read(5) + 1
                read(32 + 5 + 5)
        initial_display_delay = read(1)
        for _ in range(read(5) + 1):  # operating_points_cnt_minus_1
            read(12)  # operating_point_idc
            if read(5) > 7:  # seq_level_idx
                read(1)  # seq_tier
            if delay_bits and read(1):  # decoder_model_present_for_this_op
                read(delay_bits + delay_bits + 1)
            if initial_display_delay and read(1):
                read(4)
    width_bits, height_bits = read(4) + 1, read(4) + 1
    return read(width_bits) + 1, read(height_bits) + 1
