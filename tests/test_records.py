"""Records that anybody may have written, and files of tensors that were damaged."""

import json
import re

import pytest
import torch
from helpers import run_program
from safetensors.torch import save_file

import pyels
from pyels.files import TensorFile, write_tensors
from pyels.networks.load import load_network
from pyels.networks.network import HEADER
from pyels.records import parse_record, read_record

SCHEMA = {"name": str, "sizes": [range(1, 10)], "rate?": float, "of?": ({"n": range(3)}, None), "on?": bool}


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "a", "sizes": [1, 9]}',
        '{"name": "a", "sizes": [], "rate": 1, "of": null, "more": [[]]}',
        '{"name": "", "sizes": [3], "rate": 0.5, "of": {"n": 2}, "on": false}',
    ],
)
def test_what_a_schema_allows(text):
    assert parse_record(text, SCHEMA) == json.loads(text)


HOSTILE = [
    ("", "Expecting value"),
    ("[" * 100_000, "nested too deeply"),
    ("[]", "it must be an object, got []"),
    ('{"sizes": []}', "it has no 'name'"),
    ('{"name": ["a"], "sizes": []}', 'name must be a text, got ["a"]'),
    ('{"name": "a", "sizes": 3}', "sizes must be a list, got 3"),
    ('{"name": "a", "sizes": {"0": 3}}', 'sizes must be a list, got {"0": 3}'),
    ('{"name": "a", "sizes": [3, 10]}', "sizes[1] must be an integer from 1 to 9, got 10"),
    ('{"name": "a", "sizes": [3.0]}', "sizes[0] must be an integer from 1 to 9, got 3.0"),
    ('{"name": "a", "sizes": [true]}', "sizes[0] must be an integer from 1 to 9, got true"),
    ('{"name": "a", "sizes": [' + "3," * 100_000 + "3]}", "sizes has 100001 entries, and may have 100000"),
    ('{"name": "a", "sizes": [Infinity]}', "Infinity is no finite number"),
    ('{"name": "a", "sizes": [1e999]}', "1e999 is no finite number"),
    ('{"name": "a", "sizes": [' + "9" * 5000 + "]}", "Exceeds the limit"),
    ('{"name": "a", "sizes": [], "rate": NaN}', "NaN is no finite number"),
    ('{"name": "a", "sizes": [], "of": {"n": 3}}', "of must be an object or null, got"),
    ('{"name": "a", "sizes": [], "on": 1}', "on must be true or false, got 1"),
    (b"\xff\xfe\xfd", "decode"),
]


@pytest.mark.parametrize(("text", "message"), HOSTILE, ids=range(len(HOSTILE)))
def test_what_a_schema_refuses(tmp_path, text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_record(text, SCHEMA)
    path = tmp_path / "a.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=r"a\.json: not a record of tests \(.*" + re.escape(message)) as refused:
        read_record(path, SCHEMA, "a record of tests")
    assert len(str(refused.value)) < 500


def test_a_record_that_is_no_file_or_too_large(tmp_path):
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(FileNotFoundError, match="no such file"):
            read_record(path, {}, "a record")
    (tmp_path / "large").write_text(" " * (1 << 24) + "{}")
    with pytest.raises(ValueError, match="larger than"):
        read_record(tmp_path / "large", {}, "a record")


def test_integers_beyond_floats_are_no_finite_numbers():
    assert parse_record(str(10**308), float) == 10**308
    with pytest.raises(ValueError, match="must be a finite number"):
        parse_record(str(10**400), float)


def scales(**changed):
    return {"patch_sizes": [3, 3], "schedule": "cosine", **changed}


@pytest.mark.parametrize(
    "record",
    [
        "no json",
        "[" * 100_000,
        json.dumps([3, 3]),
        json.dumps({"patch_sizes": [3, 3]}),
        json.dumps(scales(schedule=["cosine"])),
        json.dumps(scales(patch_sizes={"0": 3})),
        json.dumps(scales(patch_sizes=[3.5])),
        json.dumps(scales(patch_sizes=[float("inf")])),
        json.dumps(scales(patch_sizes=[10**30])),
        json.dumps(scales(patch_sizes=[3] * 1_000_000)),
    ],
    ids=range(10),
)
def test_scales_from_elsewhere_are_refused_in_one_line(tmp_path, capsys, record):
    path = tmp_path / "scales.json"
    path.write_text(record)
    assert run_program("sample", "--limit", 5, "--patch-sizes", path, "--out", tmp_path / "out") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"pyels: error: {path}: not a scales.json of pyels calibrate (")
    assert len(line) < 500


def test_sizes_in_a_pickle_are_not_read(tmp_path, capsys):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    for name in ("scales.pt", "scales.pth"):
        torch.save([Bomb()], tmp_path / name)
        assert run_program("sample", "--limit", 5, "--patch-sizes", tmp_path / name, "--out", tmp_path / "out") == 2
        assert "scales.pt" in (err := capsys.readouterr().err)
        assert "a pickle may run anything" in err
        assert "cifar10-resnet-zeros" in err
    assert not (tmp_path / "executed").exists()


# ---- Files of tensors ----------------------------------------------------------------------------------------------


def test_no_flipped_bit_is_believed(tmp_path):
    path = tmp_path / "a.safetensors"
    written = {"a": torch.arange(5.0), "b": torch.tensor([7], dtype=torch.uint8)}
    write_tensors(path, written, {"key": '{"pyels-crc32":"12345678"}'})
    assert TensorFile.read(path).has_checksum
    blob = path.read_bytes()
    for i in range(8 * len(blob)):
        flipped = bytearray(blob)
        flipped[i // 8] ^= 1 << i % 8
        path.write_bytes(flipped)
        try:
            file = TensorFile.read(path)
        except ValueError as error:
            assert str(error).startswith(f"{path}: damaged safetensors file (")  # noqa: PT017
        else:  # in the name of the checksum: the tensors are as they were
            assert not file.has_checksum
            assert file.tensors.keys() == written.keys()
            assert all(torch.equal(file.tensors[name], value) for name, value in written.items())


@pytest.mark.parametrize("content", [b"", b"1234567", b"\xff" * 100, (50).to_bytes(8, "little") + b"[" * 50])
def test_files_that_hold_no_tensors(tmp_path, content):
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.safetensors: damaged safetensors file"):
        TensorFile.read(tmp_path / "a.safetensors")


@pytest.fixture
def network(tmp_path):
    path = tmp_path / "network.safetensors"
    pyels.ResNet(width=4, depth=1).save(path)
    return path


def test_damaged_networks_are_refused_by_name(network):
    blob = network.read_bytes()
    network.write_bytes(blob[:-40] + b"\1" + blob[-39:])
    with pytest.raises(ValueError, match=r"network\.safetensors: .*checksum"):
        load_network(network)
    network.write_bytes(blob)
    file = TensorFile.read(network)
    file.tensors["up.weight"][0, 0, 0, 0] = float("nan")
    save_file(file.tensors, network, {HEADER: file.metadata[HEADER]})  # as another program writes it
    with pytest.raises(ValueError, match=r"network\.safetensors: .*up\.weight .*NaN"):
        load_network(network)


CONFIG = {"channels": 1, "width": 4, "depth": 1, "num_classes": None, "padding": "zeros"}


@pytest.mark.parametrize(
    "header",
    [
        "[" * 100_000,
        "[]",
        {"config": CONFIG},
        {"kind": ["ResNet"], "config": CONFIG},
        {"kind": "VAE", "config": CONFIG},
        {"kind": "ResNet", "config": [1, 4, 1]},
        {"kind": "ResNet", "config": {**CONFIG, "width": 10**9}},
        {"kind": "ResNet", "config": {**CONFIG, "depth": 10**9}},
        {"kind": "ResNet", "config": {**CONFIG, "width": 60_000}},
        {"kind": "ResNet", "config": {**CONFIG, "width": 8}},
        {"kind": "ResNet", "config": {**CONFIG, "num_classes": "ten"}},
        {"kind": "ResNet", "config": {**CONFIG, "padding": 3}},
        {"kind": "ResNet", "config": {**CONFIG, "self": 3}},
        {"kind": "ResNet", "config": CONFIG, "training": [1]},
        {"kind": "ResNet", "config": CONFIG, "training": {"data": {"dataset": ["x"]}}},
        {"kind": "ResNet", "config": CONFIG, "training": {"data": {"dataset": "x", "limit": "5", "size": None}}},
        {"kind": "ResNet", "config": CONFIG, "training": {"data": {"dataset": "x", "limit": 5, "size": 1e300}}},
        {"kind": "ResNet", "config": CONFIG, "training": {"data": {"dataset": "x", "limit": 5, "size": 8, "bank": 3}}},
    ],
    ids=range(18),
)
def test_records_in_networks_are_refused_in_one_line(network, tmp_path, capsys, header):
    text = header if isinstance(header, str) else json.dumps(header)
    write_tensors(network, TensorFile.read(network).tensors, {HEADER: text})
    assert run_program("compare", "--network", network, "--machines", "is", "--out", tmp_path / "out") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"pyels: error: {network}: not a network saved by pyels (")
    assert len(line) < 600


def test_tensors_of_another_network_are_refused(network):
    file = TensorFile.read(network)
    for tensors in (
        {**file.tensors, "more": torch.zeros(1)},
        {name: value for name, value in file.tensors.items() if name != "up.bias"},
        {**file.tensors, "up.bias": torch.zeros(5)},
        {**file.tensors, "up.bias": torch.zeros(4, dtype=torch.int64)},
    ):
        write_tensors(network, tensors, file.metadata)
        with pytest.raises(ValueError, match=r"network\.safetensors: not a network saved by pyels \("):
            load_network(network)
