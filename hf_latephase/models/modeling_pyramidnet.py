"""A pyramidal residual network with ShakeDrop that classifies small images, with its configuration.

The file stands alone on purpose: `save_pretrained` copies it beside the weights, and
`AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)` then needs torch and transformers
(4.56.2 or newer) only.
"""

import math
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


class PyramidNetConfig(PreTrainedConfig):
    r"""
    Configuration of a [`PyramidNetForImageClassification`]. The defaults give PyramidNet-272 (alpha = 200, bottleneck)
    with ShakeDrop, for CIFAR-10.

    Args:
        depth (`int`, *optional*, defaults to 272):
            Number of weight layers: `9 * n + 2` for `n` bottleneck blocks in each of the three stages, `6 * n + 2` for
            basic blocks.
        alpha (`int`, *optional*, defaults to 200):
            By how many channels the network widens from the first block to the last: block `i` of `N` has
            `16 + alpha * i / N` channels, rounded half up (times 4 at the output of a bottleneck).
        bottleneck (`bool`, *optional*, defaults to `True`):
            Whether blocks are bottlenecks (1x1, 3x3, 1x1) or basic (3x3, 3x3).
        shakedrop (`float`, *optional*, defaults to 0.5):
            Probability that ShakeDrop disturbs the last block; it rises linearly up to there, from
            `shakedrop / N` at the first block. 0 leaves ShakeDrop out.
        num_channels (`int`, *optional*, defaults to 3):
            Number of channels of the images.
        num_labels (`int`, *optional*, defaults to 10):
            Number of classes. Given by `id2label` where that is passed.
        kwargs (*optional*):
            As in transformers' configurations, `id2label` and `label2id` for example.

    Raises:
        `ValueError`: If the values do not describe a network.

    Example:

    ```python
    >>> from hf_latephase.models import PyramidNetConfig, PyramidNetForImageClassification

    >>> configuration = PyramidNetConfig(depth=110, alpha=48, bottleneck=False, shakedrop=0.0)
    >>> PyramidNetForImageClassification(configuration).num_parameters()
    1772706
    ```"""

    model_type = "pyramidnet"

    depth: int = 272
    alpha: int = 200
    bottleneck: bool = True
    shakedrop: float = 0.5
    num_channels: int = 3

    def __post_init__(self, **kwargs: Any) -> None:
        if self.id2label is None:
            kwargs.setdefault("num_labels", 10)  # transformers' own default is 2
        super().__post_init__(**kwargs)
        self.check_values()

    if "__post_init__" not in vars(PreTrainedConfig):  # transformers 4 and 5.0

        def __init__(self, **kwargs: Any) -> None:
            own = {name: kwargs.pop(name, getattr(type(self), name)) for name in PyramidNetConfig.__annotations__}
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
        layers = 9 if self.bottleneck else 6
        if self.depth < layers + 2 or self.depth % layers != 2:
            smaller = max(self.depth - (self.depth - 2) % layers, layers + 2)
            raise ValueError(
                f"`depth` must be {layers} * n + 2 for n >= 1 blocks a stage with `bottleneck={self.bottleneck}`, got "
                f"{self.depth}. Take {smaller} or {smaller + layers}."
            )
        for name, least in (("alpha", 0), ("num_channels", 1), ("num_labels", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` must be at least {least}, got {getattr(self, name)}.")
        if not 0.0 <= self.shakedrop < 1.0:
            raise ValueError(f"`shakedrop` must lie in [0, 1), got {self.shakedrop}.")


class ShakeDrop(nn.Module):
    """
    ShakeDrop (Yamada, Iwamura, Akiba and Kise, "ShakeDrop Regularization for Deep Residual Learning", IEEE Access
    2019) of a residual branch: now and then, the branch is scaled at random, and its gradient by another number.

    In training mode the branch is left as it is with probability `1 - drop_probability`, one draw for the minibatch.
    Otherwise each image's branch is scaled by its own alpha, uniform in [-1, 1], and its gradient by its own beta,
    uniform in [0, 1] (the paper compares scales drawn for a batch, an image, a channel and a pixel). In evaluation
    mode the branch is scaled by the expectation, `1 - drop_probability`.

    Args:
        drop_probability (`float`):
            Probability that a minibatch is disturbed.
    """

    def __init__(self, drop_probability: float) -> None:
        super().__init__()
        self.drop_probability = drop_probability

    def forward(self, residual: torch.Tensor) -> torch.Tensor:
        """Scales a branch `[B, C, H, W]`."""
        if self.drop_probability == 0.0:
            return residual
        if not self.training:
            return residual * (1.0 - self.drop_probability)
        each_image = (residual.shape[0], 1, 1, 1)
        kept = residual.new_empty(()).bernoulli_(1.0 - self.drop_probability)
        alpha = residual.new_empty(each_image).uniform_(-1.0, 1.0)
        beta = residual.new_empty(each_image).uniform_(0.0, 1.0)
        # Drawing all three, used or not, spares waiting for the device and a branch in the graph.
        forward_scale = kept + (1.0 - kept) * alpha
        backward_scale = kept + (1.0 - kept) * beta
        return backward_scale * residual + (forward_scale - backward_scale) * residual.detach()

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"drop_probability={self.drop_probability:g}"


class PyramidNetBlock(nn.Module):
    """
    Convolutions with batch normalisation in front, between and behind, ReLU between only, then ShakeDrop, added to a
    shortcut without weights: the input, pooled where the block has a stride and filled up with channels of zeros.

    Args:
        in_channels (`int`):
            Number of channels of the input.
        width (`int`):
            Number of channels of the 3x3 convolutions, and of the output of a basic block.
        stride (`int`):
            Stride of the first 3x3 convolution.
        bottleneck (`bool`):
            Whether the block is 1x1, 3x3, 1x1 to 4 times the width, or 3x3, 3x3.
        drop_probability (`float`):
            ShakeDrop's probability.
    """

    def __init__(self, in_channels: int, width: int, stride: int, bottleneck: bool, drop_probability: float) -> None:
        super().__init__()
        if bottleneck:
            channels, kernels, strides = [in_channels, width, width, 4 * width], [1, 3, 1], [1, stride, 1]
        else:
            channels, kernels, strides = [in_channels, width, width], [3, 3], [stride, 1]
        # Not "norm": Trainer knows layers that it exempts from weight decay by such names, but not all of ours.
        layers: list[nn.Module] = [nn.BatchNorm2d(in_channels)]
        for index, (kernel, conv_stride) in enumerate(zip(kernels, strides, strict=True)):
            if index > 0:
                layers.append(nn.ReLU())
            here, there = channels[index : index + 2]
            layers.append(nn.Conv2d(here, there, kernel, stride=conv_stride, padding=kernel // 2, bias=False))
            layers.append(nn.BatchNorm2d(there))
        self.branch = nn.Sequential(*layers)
        self.shakedrop = ShakeDrop(drop_probability)
        # ceil_mode: as many pixels as the 3x3 convolution leaves of an odd number.
        self.pool = nn.AvgPool2d(2, ceil_mode=True) if stride == 2 else nn.Identity()
        self.new_channels = channels[-1] - in_channels

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Maps `[B, in_channels, H, W]` to `[B, out_channels, ceil(H / stride), ceil(W / stride)]`."""
        residual = self.shakedrop(self.branch(hidden))
        return residual + F.pad(self.pool(hidden), (0, 0, 0, 0, 0, self.new_channels))


class PyramidNetForImageClassification(PreTrainedModel):
    r"""
    A pyramidal residual network (Han, Kim and Kim, "Deep Pyramidal Residual Networks", CVPR 2017, with additive
    widening): a convolution to 16 channels with batch normalisation, three stages of ever wider blocks of which the
    last two halve the image, batch normalisation, ReLU, the mean over the image, a linear output.

    Images of any size will do; the published networks are for 32 x 32. Widths are rounded as in the authors' code.

    Args:
        config ([`PyramidNetConfig`]):
            Configuration of the model.
    """

    config_class = PyramidNetConfig
    main_input_name = "pixel_values"
    input_modalities = "image"
    # Running a block again for its gradients would count each minibatch twice in the running statistics.
    supports_gradient_checkpointing = False
    _no_split_modules = ["PyramidNetBlock"]

    def __init__(self, config: PyramidNetConfig):
        super().__init__(config)
        # Attributes of a config can be assigned after it was made.
        config.check_values()
        channels = 16
        self.stem = nn.Conv2d(config.num_channels, channels, 3, padding=1, bias=False)
        self.stem_bn = nn.BatchNorm2d(channels)
        blocks_a_stage = (config.depth - 2) // (9 if config.bottleneck else 6)
        num_blocks = 3 * blocks_a_stage
        stages: list[list[nn.Module]] = [[], [], []]
        for index in range(num_blocks):
            stage, index_in_stage = divmod(index, blocks_a_stage)
            stride = 2 if stage > 0 and index_in_stage == 0 else 1
            width = math.floor(16 + config.alpha * (index + 1) / num_blocks + 0.5)
            drop_probability = config.shakedrop * (index + 1) / num_blocks
            stages[stage].append(PyramidNetBlock(channels, width, stride, config.bottleneck, drop_probability))
            channels = 4 * width if config.bottleneck else width
        self.stages = nn.ModuleList(nn.Sequential(*blocks) for blocks in stages)
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
        hidden = self.stem_bn(self.stem(pixel_values))
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
