"""Import, export and comparison hold tensors one at a time: measured in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, math, re, sys
from pathlib import Path

import pytest

import torch

from cola_megatron.config import DiTConfig, ColaModelConfig, VAEConfig
from cola_megatron.families.cola.published import write_published
from cola_megatron.families.cola.published_names import dit_rules, vae_rules
from cola_megatron.checkpoint import sharded_tensors
from cola_megatron.conversion.export_checkpoint import export_checkpoint
from cola_megatron.conversion.import_weights import import_weights
from cola_megatron.compare_models import compare_models

MEGABYTE = 10**6
# Files of a checkpoint are larger than this whole model would be; in proportion, they are like these.
sharded_tensors.FILE_BYTES, sharded_tensors.PIECE_BYTES = 16 * MEGABYTE, 4 * MEGABYTE


class Generated:
    def __init__(self, rules):
        self.shapes = {name: rule.our_shape for name, rule in rules.items()}

    def read(self, name):
        return torch.full(self.shapes[name], 1 + len(name) / 256)


def model(hidden, layers):
    vae = VAEConfig(encoder_layers=1, decoder_layers=1, hidden_size=64, ffn_hidden_size=128, num_attention_heads=4)
    return ColaModelConfig(vocab_size=320, vae=vae, dit=DiTConfig(num_layers=layers, hidden_size=hidden))


def peak():
    (kilobytes,) = re.findall(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())
    return int(kilobytes) / 1000


def measured(work):
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before = peak()
    work()
    return peak() - before


def round_trip(config, folder, shard):
    rules = {f"vae.{name}": rule for name, rule in vae_rules(config.vae, config.vocab_size).items()}
    rules |= {f"dit.{name}": rule for name, rule in dit_rules(config.dit).items()}
    source = Generated(rules)
    published, imported, exported = (folder / name for name in ("published", "imported", "exported"))
    found = {
        "write": measured(lambda: write_published(published, config, source, None, max_shard_bytes=shard)),
        "import": measured(lambda: import_weights(published, imported, "tiny", [], progress=False)),
        "export": measured(lambda: export_checkpoint(imported, exported, max_shard_bytes=shard, progress=False)),
        "verify": measured(lambda: compare_models(published, exported, forward=False, progress=False)),
    }
    sizes = [4 * math.prod(shape) / MEGABYTE for shape in source.shapes.values()]
    return {"peaks": found, "model": sum(sizes), "tensor": max(sizes)}


folder = Path(sys.argv[1])
round_trip(model(64, 1), folder / "small", 10**5)  # whatever is loaded once is loaded now
print(json.dumps(round_trip(model(512, 12), folder / "large", 32 * MEGABYTE)))
"""


@pytest.mark.slow
def test_no_more_than_a_file_and_a_few_tensors_are_held(tmp_path: Path) -> None:
    run = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert len(list((tmp_path / "large" / "exported" / "cola_dit").glob("model-*.safetensors"))) >= 5
    assert found["model"] > 30 * found["tensor"]
    for name, peak in found["peaks"].items():
        # Megabytes: one file of the checkpoint, tensors in a few types and orders, what is read and not yet let go.
        assert peak < 16 + 6 * found["tensor"] + 16, f"{name}: {found}"
        assert peak < 0.4 * found["model"], f"{name}: {found}"
