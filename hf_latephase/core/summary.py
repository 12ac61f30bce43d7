"""What late-phase weights are on a model, in words."""

from __future__ import annotations

from collections import defaultdict

from torch import nn

from .weights import Attachment, Target


def summarise(model: nn.Module, attachments: list[Attachment], frozen: list[Target], num_members: int) -> str:
    """
    Returns what is replicated, by family and by the rule that chose it, and what it costs, a line each.

    Args:
        model (`torch.nn.Module`):
            The model with its members attached.
        attachments (`list[Attachment]`), frozen (`list[Target]`):
            What is attached, and what was left out because it is not trained.
        num_members (`int`):
            K.
    """
    own = dict(model.named_parameters()) | dict(model.named_buffers())
    groups: dict[tuple[str, str], list[int]] = defaultdict(list)
    late: dict[str, int] = {}
    extra = 0
    for attachment in attachments:
        stacks = {attachment.prefix + name: own[attachment.prefix + name] for name in attachment.stacks}
        trained = {name: stack.numel() for name, stack in stacks.items() if isinstance(stack, nn.Parameter)}
        groups[attachment.target.family, attachment.target.rule].append(sum(trained.values()) // num_members)
        late |= trained
        # Of copies the plain model has one itself.
        kept = num_members if attachment.stacks != ["original"] else num_members - 1
        extra += sum(stack.nbytes // num_members * kept for stack in stacks.values())
    lines = [
        f"{family}: {_count(len(sizes), 'tensor')}, {sum(sizes):,} parameters a member ({rule})"
        for (family, rule), sizes in groups.items()
    ]
    if frozen:
        lines.append(f"left out, as they are frozen: {_count(len(frozen), 'tensor')}, {frozen[0].key} and so on")
    others = sum(p.numel() for name, p in model.named_parameters() if name not in late)
    cost = (
        f"{sum(late.values()):,} late-phase parameters, {others:,} others; {extra:,} more bytes than the plain model"
    )
    return "\n".join([*lines, f"{_count(num_members, 'member')}: {cost}"])


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' if number != 1 else ''}"
