"""A wide residual network that classifies small images, with its configuration.

The file stands alone on purpose: `save_pretrained` copies it beside the weights, and
`AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)` then needs torch and transformers
(4.56.2 or newer) only.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.utils import can_return_tuple


try:
    from transformers import PreTrainedConfig
    from transformers import initialization as init
except ImportError:  # transformers 4, which asks `_init_weights` only about modules of which something is missing
    from torch.nn import init  # type: ignore[no-redef]
    from transformers import PretrainedConfig as PreTrainedConfig


class WideResNetConfig(PreTrainedConfig):
    r"""
    Configuration of a [`WideResNetForImageClassification`]. The defaults give WRN-28-10 for CIFAR-10.

    Args:
        depth (`int`, *optional*, defaults to 28):
            Number of convolutions on the way through the network (projections of shortcuts counted, as in the paper):
            `6 * n + 4` for `n` blocks in each of the three stages.
        widen_factor (`int`, *optional*, defaults to 10):
            The `k` of the paper: the stages have `16 * k`, `32 * k` and `64 * k` channels.
        num_channels (`int`, *optional*, defaults to 3):
            Number of channels of the images.
        dropout (`float`, *optional*, defaults to 0.0):
            Dropout probability between the two convolutions of every block.
        num_labels (`int`, *optional*, defaults to 10):
            Number of classes. Given by `id2label` where that is passed.
        kwargs (*optional*):
            As in transformers' configurations, `id2label` and `label2id` for example.

    Raises:
        `ValueError`: If the values do not describe a network.

    Example:

    ```python
    >>> from hf_latephase.models import WideResNetConfig, WideResNetForImageClassification

    >>> WideResNetForImageClassification(WideResNetConfig(depth=28, widen_factor=10)).num_parameters()
    36479194
    ```"""

    model_type = "wide_resnet"

    depth: int = 28
    widen_factor: int = 10
    num_channels: int = 3
    dropout: float = 0.0

    def __post_init__(self, **kwargs: Any) -> None:
        if self.id2label is None:
            kwargs.setdefault("num_labels", 10)  # transformers' own default is 2
        super().__post_init__(**kwargs)
        self.check_values()

    if "__post_init__" not in vars(PreTrainedConfig):  # transformers 4 and 5.0

        def __init__(self, **kwargs: Any) -> None:
            own = {name: kwargs.pop(name, getattr(type(self), name)) for name in WideResNetConfig.__annotations__}
            if kwargs.get("id2label") is None:
                kwargs.setdefault("num_labels", 10)
            super().__init__(**kwargs)
            vars(self).update(own)
            self.check_values()

    def to_diff_dict(self) -> dict[str, Any]:
        """What is saved. transformers would leave two unnamed classes out, as its default, and ours would return."""
        return {**super().to_diff_dict(), "id2label": self.id2label, "label2id": self.label2id}

    def check_values(self) -> None:
        """Raises a `ValueError` if the values do not describe a model. Called here and again when a model is built."""
        if self.depth < 10 or self.depth % 6 != 4:
            smaller = max(self.depth - (self.depth - 4) % 6, 10)
            raise ValueError(
                "`depth` must be 6 * n + 4 for n >= 1 blocks a stage (10, 16, 22, 28, 40, ...), got "
                f"{self.depth}. Take {smaller} or {smaller + 6}."
            )
        for name in ("widen_factor", "num_channels", "num_labels"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"`dropout` must lie in [0, 1), got {self.dropout}.")


class WideResNetBlock(nn.Module):
    """
    Two 3x3 convolutions, each behind batch normalisation and ReLU, added to a shortcut.

    Args:
        in_channels (`int`):
            Number of channels of the input.
        out_channels (`int`):
            Number of channels of the output.
        stride (`int`):
            Stride of the first convolution.
        dropout (`float`):
            Dropout probability in front of the second convolution.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, dropout: float) -> None:
        super().__init__()
        # Not "norm": Trainer knows layers that it exempts from weight decay by such names, but not all of ours.
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.projection = None
        if in_channels != out_channels or stride != 1:
            self.projection = nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Maps `[B, in_channels, H, W]` to `[B, out_channels, ceil(H / stride), ceil(W / stride)]`."""
        activated = F.relu(self.bn1(hidden))
        # A projection sees what the convolutions see; an identity passes on the sum of the blocks before.
        shortcut = hidden if self.projection is None else self.projection(activated)
        residual = self.conv1(activated)
        residual = self.conv2(self.dropout(F.relu(self.bn2(residual))))
        return residual + shortcut


class WideResNetForImageClassification(PreTrainedModel):
    r"""
    A wide residual network (Zagoruyko and Komodakis, "Wide Residual Networks", BMVC 2016) with pre-activated blocks of
    two 3x3 convolutions: a convolution to 16 channels, three stages of which the last two halve the image, batch
    normalisation, ReLU, the mean over the image, a linear output.

    Images of any size will do; the published networks are for 32 x 32.

    Args:
        config ([`WideResNetConfig`]):
            Configuration of the model.
    """

    config_class = WideResNetConfig
    main_input_name = "pixel_values"
    input_modalities = "image"
    # Running a block again for its gradients would count each minibatch twice in the running statistics.
    supports_gradient_checkpointing = False
    _no_split_modules = ["WideResNetBlock"]

    def __init__(self, config: WideResNetConfig):
        super().__init__(config)
        # Attributes of a config can be assigned after it was made.
        config.check_values()
        channels = 16
        self.stem = nn.Conv2d(config.num_channels, channels, 3, padding=1, bias=False)
        self.stages = nn.ModuleList()
        for width, stride in ((16, 1), (32, 2), (64, 2)):
            blocks = []
            for index in range((config.depth - 4) // 6):
                out_channels = width * config.widen_factor
                blocks.append(WideResNetBlock(channels, out_channels, stride if index == 0 else 1, config.dropout))
                channels = out_channels
            self.stages.append(nn.Sequential(*blocks))
        self.bn = nn.BatchNorm2d(channels)
        self.classifier = nn.Linear(channels, config.num_labels)  # type: ignore[arg-type]  # checked above
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        # `init` leaves alone what from_pretrained has loaded; torch's own reset_parameters would not.
        if isinstance(module, nn.Conv2d):
            init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            bound = module.in_features**-0.5
            init.uniform_(module.weight, -bound, bound)
            init.zeros_(module.bias)
        else:
            super()._init_weights(module)  # batch normalisation

    @can_return_tuple
    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None, **kwargs: Any
    ) -> ImageClassifierOutput:
        r"""
        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`):
                The images, normalised, in the floating-point type of the weights.
            labels (`torch.LongTensor` of shape `(batch_size,)`, *optional*):
                The classes, from 0 to `config.num_labels - 1`, for the cross entropy. As in transformers' other
                classifiers, `config.problem_type`, `num_labels=1` and floating-point labels select other losses.
            return_dict (`bool`, *optional*):
                Whether to return a [`~modeling_outputs.ImageClassifierOutput`] or a tuple.
            kwargs (`dict`, *optional*):
                Passed to the loss: `num_items_in_batch`.

        Returns:
            [`~modeling_outputs.ImageClassifierOutput`] with `loss` (if there are labels) and `logits` of shape
            `(batch_size, num_labels)`.

        Raises:
            `ValueError`: If `pixel_values` are not images of `config.num_channels` channels.
        """
        _check_images(pixel_values, self.config.num_channels)
        hidden = self.stem(pixel_values)
        for stage in self.stages:
            hidden = stage(hidden)
        features = F.relu(self.bn(hidden)).mean(dim=(2, 3))
        logits = self.classifier(features)

        loss = None
        if labels is not None:
            loss = self.loss_function(labels, logits, self.config, **kwargs)
        return ImageClassifierOutput(loss=loss, logits=logits)


def _check_images(pixel_values: torch.Tensor, num_channels: int) -> None:
    """Raises a `ValueError` unless `pixel_values` are images `[B, num_channels, H, W]`."""
    if pixel_values.dim() != 4 or pixel_values.shape[1] != num_channels:
        raise ValueError(
            f"`pixel_values` must have the shape (batch_size, {num_channels}, height, width), got "
            f"{tuple(pixel_values.shape)}. Convert the images to {num_channels} channels, channels first, or make the "
            "model with another `num_channels`."
        )
