"""What late-phase training would cost where this project could not run it: a reckoning, not a measurement."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where `runs` is

from hf_latephase import LatePhase, LatePhaseConfig
from runs import markdown


# The model: LlamaConfig's defaults, llama 7B. One minibatch a GPU.
GPUS, MEMBERS, TOKENS = 64, 8, 4096
# An H100's published bfloat16 arithmetic at the share that training usually reaches, and its memory's speed.
FLOPS, BANDWIDTH = 0.4 * 989e12, 3.35e12
STATE_BYTES, COMPUTE_BYTES = 16, 2  # float32 weight, gradient and two moments; bfloat16 in passes
# Times that a weight-sized tensor is read or written for a rank-1 product in a minibatch (rank1_functions.py): product
# and product again 4 each, its gradient times the weight 3, the factors' gradients 2, the weight's gradient 4.
WEIGHT_STREAMS = 17
# The same if torch.compile fuses what is elementwise: 2, 2 and one pass over gradient and weight, 3.
FUSED_STREAMS = 7


def estimate() -> str:
    """Memory, communication, traffic and kernels of two families, as a table."""
    rows = []
    for family, kernels in (("norm", 2), ("rank1", 15)):
        with torch.device("meta"):
            model = LlamaForCausalLM(LlamaConfig())
        base = sum(p.numel() for p in model.parameters())
        late_phase = LatePhase(model, LatePhaseConfig(num_members=MEMBERS, weights=[family]))
        stacks = sum(p.numel() for p in late_phase.stacks().values())
        weights = sum(
            model.get_submodule(t.module).parametrizations[t.tensor].original.numel() for t in late_phase.targets
        )
        seconds = 6 * base * TOKENS / FLOPS
        streams = (WEIGHT_STREAMS, FUSED_STREAMS) if family == "rank1" else (0, 0)
        eager, fused = (count * weights * COMPUTE_BYTES / BANDWIDTH / seconds for count in streams)
        rows += [
            [
                family,
                "late-phase tensors; parameters of a member",
                f"{len(late_phase.targets)}; {stacks // MEMBERS:,}",
            ],
            [family, "more sharded memory a GPU", f"{stacks * STATE_BYTES / GPUS / 2**20:.1f} MiB"],
            [family, "more gathered at a time, a block", f"{stacks * COMPUTE_BYTES / 32 / 2**20:.1f} MiB"],
            [family, "more communication", f"{100 * stacks / base:.2f} %"],
            [family, "more kernels a minibatch, eager", f"{kernels * len(late_phase.targets):,}"],
            [family, "more memory traffic, in time of the plain minibatch", f"{100 * eager:.1f} % eager"],
        ]
        if fused:
            rows[-1][-1] += f", {100 * fused:.1f} % if fused"
    return markdown(["family", f"llama 7B, {GPUS} GPUs under FSDP2, K = {MEMBERS}, reckoned", ""], 2, rows)


if __name__ == "__main__":
    print(estimate())
