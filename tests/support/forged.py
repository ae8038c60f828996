"""Delta files whose headers were forged."""

import json

import safetensors.torch

from mm_piece.deltas import file as deltafile


def sealed(data: bytes) -> bytes:
    """Forge a matching seal: what a hostile author would do."""
    seal = deltafile.CHECKSUM_SLICE
    return data[: seal.start] + deltafile._compute_checksum(data) + data[seal.stop :]


def forge(header, payload) -> bytes:
    text = '{"sha256":"' + "0" * 64 + '",' + header[1:]
    return sealed(safetensors.torch.save(payload, {"mm_piece": text}))


def header_of(data: bytes) -> dict:
    length = int.from_bytes(data[:8], "little")
    header = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["mm_piece"])
    del header["sha256"]
    return header
