"""How much memory a merge takes: a Llama of a billion random parameters, built on disk, and a LoRA of it all.

In turns with PEFT's `merge_and_unload` in memory, each in a process of its own; every layer is checked, as for a model
that is too large to be asked as a whole. Ends with exit code 1 where the peak is above 1.3 times the largest shard and
1 GB. The last line is one JSON object. Takes 5 GB of disk, which is given back.

    python benchmarks/merge.py --layers 17
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SHARD = 500_000_000

BUILD = """
import sys, torch
from pathlib import Path
from tunesmith.assets import TINY_MODEL
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from peft import LoraConfig, get_peft_model
place, layers = Path(sys.argv[1]), int(sys.argv[2])
torch.set_default_dtype(torch.bfloat16)
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(
    vocab_size=4096, hidden_size=2048, intermediate_size=8192, num_hidden_layers=layers,
    num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=2048, tie_word_embeddings=False))
model.save_pretrained(place / "base", max_shard_size=int(sys.argv[3]))
AutoTokenizer.from_pretrained(TINY_MODEL).save_pretrained(place / "base")
model.name_or_path = model.config._name_or_path = str(place / "base")
tuned = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM",
    base_model_name_or_path=str(place / "base")))
for name, weight in tuned.named_parameters():
    if "lora_B" in name:
        torch.nn.init.normal_(weight, std=0.01)
tuned.peft_config["default"].base_model_name_or_path = str(place / "base")
tuned.save_pretrained(place / "adapter")
print(sum(p.numel() for p in model.parameters()))
"""

OURS = """
import resource, sys
from tunesmith import api
place, shard = sys.argv[1], sys.argv[2] + "B"
merged = api.merge(place + "/adapter", output=place + "/ours", max_shard_size=shard, check="layers")
assert merged.parity.layers.passed
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""

PEER = """
import resource, sys, torch
from peft import AutoPeftModelForCausalLM
model = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1] + "/adapter", dtype=torch.bfloat16)
model.merge_and_unload().save_pretrained(sys.argv[1] + "/peer", max_shard_size=int(sys.argv[2]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def said(code: str, *arguments: str | int) -> int:
    """The number that a process of its own ends with."""
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    return int(done.stdout.strip().splitlines()[-1])


def main() -> None:
    """Build, merge by both, compare peaks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=17, help="17 are a billion parameters")
    parser.add_argument("--place", default=None, help="folder with 7 GB of room")
    args = parser.parse_args()
    place = Path(tempfile.mkdtemp(prefix="merge-", dir=args.place))
    try:
        parameters = said(BUILD, place, args.layers, SHARD)
        ours = said(OURS, place, SHARD)
        largest = max(file.stat().st_size for file in (place / "ours").glob("*.safetensors"))
        shutil.rmtree(place / "ours")
        peer = said(PEER, place, SHARD)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    allowed = 1.3 * largest + 1e9
    print(f"{parameters:,} parameters, largest shard {largest / 1e6:,.0f} MB")
    print(f"peak {ours / 1e6:,.0f} MB, allowed {allowed / 1e6:,.0f} MB; PEFT in memory {peer / 1e6:,.0f} MB")
    result = {
        "name": "merge",
        "ours": ours,
        "peer": peer,
        "ratio": round(peer / ours, 3),
        "unit": "bytes",
        "n": 1,
    }
    print(json.dumps({**result, "allowed": round(allowed), "largest_shard": largest}))
    sys.exit(0 if ours <= allowed else 1)


if __name__ == "__main__":
    main()
