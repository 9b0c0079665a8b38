"""SynerNet: two ViT branches, a broad and a precise one, that teach each other segmentation from image-level labels."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from .cam_synernet import (
    BranchPair,
    BranchView,
    at_input_size,
    chosen_branches,
    crop_to_input,
    fuse_branches,
    joint_features,
    lower_unlikely_classes,
    multi_scale_cams,
    normalize_cams,
    propagate_cams,
    read_views,
)
from .configuration_synernet import SynerNetConfig, encoder_family
from .encoder_synernet import (
    check_keywords,
    copy_encoder,
    forward_arguments,
    part_of_encoder,
    pretrained_encoder,
    run_blocks,
    select_states,
    token_grid,
    with_current_names,
)
from .objective_synernet import SynerNetObjective, batch_objective
from .refinement_synernet import masks_to_boxes, present_classes, spread_classes


@dataclass
class SynerNetBranchOutput(ModelOutput):
    """
    Output of one branch; `h` and `w` count tokens.

    Args:
        classification_logits, auxiliary_classification_logits (`torch.FloatTensor` of shape `(B, C)`): class scores,
            pooled from the last and the auxiliary layer.
        class_token_logits (`torch.FloatTensor` of shape `(B, C)`, *optional*): with `config.with_class_token_head`.
        cam_logits, auxiliary_cam_logits (`torch.FloatTensor` of shape `(B, C, h, w)`): CAMs of these layers,
            unnormalised.
        logits (`torch.FloatTensor` of shape `(B, K, h, w)`): segmentation logits.
        features, auxiliary_features (`torch.FloatTensor` of shape `(B, D, h, w)`): patch features of the last layer,
            after the final normalisation, and of the auxiliary layer.
        class_token (`torch.FloatTensor` of shape `(B, D)`): class token after the final normalisation, or what stands
            for it in a family without one.
        hidden_states (`tuple(torch.FloatTensor)`): embeddings and the output of every block.
        attentions (`tuple(torch.FloatTensor)`, *optional*): attention maps, if asked for.
    """

    classification_logits: torch.FloatTensor | None = None
    auxiliary_classification_logits: torch.FloatTensor | None = None
    class_token_logits: torch.FloatTensor | None = None
    cam_logits: torch.FloatTensor | None = None
    auxiliary_cam_logits: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    features: torch.FloatTensor | None = None
    auxiliary_features: torch.FloatTensor | None = None
    class_token: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None

    @property
    def tokens(self) -> torch.Tensor:
        """Class token and patch features as one sequence, `(B, 1 + h·w, D)`."""
        return torch.cat([self.class_token[:, None], self.features.flatten(2).transpose(1, 2)], dim=1)


@dataclass
class SynerNetModelOutput(ModelOutput):
    """
    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(B, 1 + h·w, n·D)`):
            Class token and patch features after the final normalisation, of the n branches that ran, broad first.
        hidden_states, attentions (`tuple(torch.FloatTensor)`, *optional*): of the branches that ran, broad first.
        broad, precise ([`SynerNetBranchOutput`], *optional*): output of the branch, if it ran.
    """

    last_hidden_state: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    broad: SynerNetBranchOutput | None = None
    precise: SynerNetBranchOutput | None = None

    @property
    def pair(self) -> BranchPair[SynerNetBranchOutput | None]:
        """`BranchPair`: the outputs of both branches, `None` for one that did not run."""
        return BranchPair(self.broad, self.precise)


@dataclass
class SynerNetSegmenterOutput(ModelOutput):
    """
    Args:
        loss (`torch.FloatTensor`, *optional*): scalar, returned with `labels`.
        loss_dict (`dict[str, torch.FloatTensor]`, *optional*): The active terms, weighted and summed over the
            branches, without gradient; they add up to `loss`. Names: `loss_cls`, `loss_cls_aux`, `loss_cls_token`,
            `loss_spatial_bce`, `loss_patch_contrast`, `loss_prototype_contrast`, `loss_segmentation`.
        logits (`torch.FloatTensor` of shape `(B, K, H, W)`):
            Segmentation logits, float32, at the size of `pixel_values`: both branches mixed by
            `config.broad_share_in_logits`, resized bilinearly. With a class token head, unlikely classes are lowered.
            `None`, as those of the branches, in a training step whose segmentation loss has weight 0.
        broad_logits, precise_logits (`torch.FloatTensor` of shape `(B, K, H, W)`, *optional*): of one branch, without
            class prior.
        classification_logits (`torch.FloatTensor` of shape `(B, C)`):
            Class scores of the image, mean of the branches, from the class token heads if the model has them.
        broad_cams, precise_cams (`torch.FloatTensor` of shape `(B, C, H, W)`, *optional*): Single-scale CAMs of a branch
            in [0, 1] at the size of `pixel_values`, of every class; `None` in training mode.
            [`~SynerNetForWeaklySupervisedSegmentation.generate_cams`] gives those that make labels.
        confidence (`torch.FloatTensor` of shape `(B, 1, H, W)`, *optional*): share of layers and branches that agree.
        pseudo_labels (`torch.LongTensor` of shape `(B, H, W)`, *optional*):
            Label that teaches the precise branch, 255 where undecided; with `labels` and a loss that needs it.
        hidden_states, attentions (`tuple(torch.FloatTensor)`, *optional*): of both branches, broad first, if asked for.
    """

    loss: torch.FloatTensor | None = None
    loss_dict: dict[str, torch.FloatTensor] | None = None
    logits: torch.FloatTensor | None = None
    broad_logits: torch.FloatTensor | None = None
    precise_logits: torch.FloatTensor | None = None
    classification_logits: torch.FloatTensor | None = None
    broad_cams: torch.FloatTensor | None = None
    precise_cams: torch.FloatTensor | None = None
    confidence: torch.FloatTensor | None = None
    pseudo_labels: torch.LongTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class SynerNetCamOutput(ModelOutput):
    """
    Multi-scale CAMs at the image's size, `(B, C, H, W)` float in [0, 1].

    Args:
        broad_cams, precise_cams (`torch.FloatTensor`): last layer of each branch.
        broad_aux_cams, precise_aux_cams (`torch.FloatTensor`): auxiliary layer of each branch.
        fused_cams (`torch.FloatTensor`): mean of the two fused CAMs that teach the branches.
        confidence (`torch.FloatTensor` of shape `(B, 1, H, W)`): share of layers and branches that agree, in [0, 1].
    """

    broad_cams: torch.FloatTensor | None = None
    precise_cams: torch.FloatTensor | None = None
    broad_aux_cams: torch.FloatTensor | None = None
    precise_aux_cams: torch.FloatTensor | None = None
    fused_cams: torch.FloatTensor | None = None
    confidence: torch.FloatTensor | None = None


class SynerNetTokenClassifier(nn.Linear):
    """
    A linear layer that computes maps of tokens, channels last, as a 1×1 convolution: its sums are those of the recorded
    results to the bit. Weights of another kind (quantised, sharded) know the linear layer only.
    """

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """`(B, D)` or `(B, h, w, D)` → `(B, C)` or `(B, h, w, C)`."""
        if tokens.ndim < 4 or type(self.weight) is not nn.Parameter:
            return super().forward(tokens)
        return F.conv2d(tokens.movedim(-1, 1), self.weight[..., None, None]).movedim(1, -1)


class SynerNetClassActivationHead(nn.Module):
    """
    A bias-free linear classifier of every token (CAM) and, for class scores, of pooled tokens, or its pooled CAM. Both
    call the classifier, never read its weight: adapters and quantisers put another module in its place.
    """

    def __init__(self, config: SynerNetConfig, pooling_top_k: int):
        super().__init__()
        self.pooling_top_k, self.logits_share = pooling_top_k, config.logits_pooling_share
        width, num_classes = config.backbone_config.hidden_size, config.num_foreground_labels
        self.classifier = SynerNetTokenClassifier(width, num_classes, bias=False)

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`(B, D, h, w)` features → class scores `(B, C)` and CAM logits `(B, C, h, w)`."""
        if self.logits_share is not None:
            values = (cam_logits := self.cam_logits(features)).flatten(2)
            top_k = max(round(self.logits_share * values.shape[-1]), 1)
            return values.topk(top_k, dim=-1).values.mean(dim=-1), cam_logits
        tokens = features.flatten(2)
        pooled = tokens.topk(min(self.pooling_top_k, tokens.shape[-1]), dim=-1).values.mean(dim=-1)
        return self.classifier(pooled), self.cam_logits(features)

    def cam_logits(self, features: torch.Tensor) -> torch.Tensor:
        """`(B, D, h, w)` features → CAM logits `(B, C, h, w)`, unnormalised."""
        return self.classifier(features.movedim(1, -1)).movedim(-1, 1)


class SynerNetDecodeHead(nn.Module):
    """LargeFOV decoder: two dilated 3×3 convolutions and a 1×1 one, no biases (authors' code)."""

    def __init__(self, config: SynerNetConfig):
        super().__init__()
        width, dilation = config.decoder_hidden_size, config.decoder_dilation
        dilated = {"kernel_size": 3, "padding": dilation, "dilation": dilation, "bias": False}
        self.conv_in = nn.Conv2d(config.backbone_config.hidden_size, width, **dilated)
        self.conv_mid = nn.Conv2d(width, width, **dilated)
        self.classifier = nn.Conv2d(width, config.num_labels, kernel_size=1, bias=False)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """`(B, D, h, w)` features → segmentation logits `(B, K, h, w)`."""
        return self.classifier(self.conv_mid(self.conv_in(features).relu()).relu())


class SynerNetProjectionHead(nn.Module):
    """Projects class tokens for instance learning, and keeps the class prototypes (authors' code)."""

    def __init__(self, config: SynerNetConfig):
        super().__init__()
        hidden, bottleneck = config.projection_hidden_size, config.projection_bottleneck_size
        self.layers = nn.Sequential(
            nn.Linear(config.backbone_config.hidden_size, hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden),
            nn.GELU(),
            nn.Linear(hidden, bottleneck),
        )
        self.directions = nn.Linear(bottleneck, config.prototype_size, bias=False)
        self.register_buffer("prototypes", torch.zeros(config.num_foreground_labels, config.prototype_size))

    def forward(self, class_token: torch.Tensor) -> torch.Tensor:
        """`(B, D)` class tokens → embeddings `(B, P)`: cosines to the rows of the last layer."""
        bottleneck = F.normalize(self.layers(class_token), dim=-1)
        # the weights as the module applies them: it may be an adapter's or a quantiser's
        with torch.autocast(device_type=class_token.device.type, enabled=False):
            unit_vectors = torch.eye(bottleneck.shape[-1], dtype=self.prototypes.dtype, device=self.prototypes.device)
            directions = self.directions(unit_vectors).T.contiguous()
        return F.linear(bottleneck, F.normalize(directions, dim=-1))


class SynerNetSharedEncoder(nn.Module):
    """The first `config.shared_encoder_layers` blocks of the encoder, run once for both branches."""

    def __init__(self, config: SynerNetConfig):
        super().__init__()
        self.backbone = part_of_encoder(config, 0, config.shared_encoder_layers)
        self.backbone_arguments = forward_arguments(self.backbone)

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """`(B, 3, H, W)`, sides multiples of the patch → embeddings and every shared block's output, `(B, N, D)` each."""
        return self.backbone(
            pixel_values, output_hidden_states=True, return_dict=True, **self.backbone_arguments
        ).hidden_states


class SynerNetBranch(nn.Module):
    """One encoder, or what follows the shared blocks, with its CAM heads, decoder and projection head."""

    def __init__(self, config: SynerNetConfig, pooling_top_k: int):
        super().__init__()
        self.auxiliary_layer_index = config.auxiliary_layer_index
        self.additional_cam_layers = config.additional_cam_layers
        self.family = encoder_family(config.backbone_config)
        depth = config.backbone_config.num_hidden_layers
        self.backbone = part_of_encoder(config, config.shared_encoder_layers, depth)
        self.backbone_arguments = forward_arguments(self.backbone)
        self.cam_head = SynerNetClassActivationHead(config, pooling_top_k)
        self.auxiliary_cam_head = SynerNetClassActivationHead(config, pooling_top_k)
        self.class_token_head = None
        if config.with_class_token_head:
            self.class_token_head = nn.Linear(config.backbone_config.hidden_size, config.num_foreground_labels)
        self.decode_head = SynerNetDecodeHead(config)
        self.projection_head = SynerNetProjectionHead(config) if config.with_projection_head else None

    def encode(
        self,
        pixel_values: torch.Tensor,
        shared_states: tuple[torch.Tensor, ...] | None = None,
        output_attentions: bool = False,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...], tuple[torch.Tensor, ...] | None]:
        """
        `(B, 3, H, W)` images, sides multiples of the patch, and the `shared_states` of [`SynerNetSharedEncoder`] → all
        tokens after the final normalisation `(B, N, D)`, the hidden states (embeddings first), attention maps or `None`.
        """
        norm = self.backbone.get_submodule(self.family.norm)
        if shared_states is not None:
            states = (*shared_states, *run_blocks(self.backbone, shared_states[-1], pixel_values))
            return norm(states[-1]), states, None
        arguments = {"output_attentions": output_attentions, "return_dict": True, **self.backbone_arguments}
        encoded = self.backbone(pixel_values, output_hidden_states=True, **arguments)
        tokens = encoded.last_hidden_state
        return tokens if self.family.norm_applied else norm(tokens), encoded.hidden_states, encoded.attentions

    def class_token(self, tokens: torch.Tensor) -> torch.Tensor:
        """What stands for the image `(B, D)` among the tokens `(B, prefix + h·w, D)` that `encode` gives."""
        if self.family.class_token == "head":
            return self.backbone.head(tokens)
        return tokens[:, 0] if self.family.class_token == "own" else tokens[:, self.family.prefix_tokens :].mean(dim=1)

    def patch_map(self, tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Tokens `(B, prefix + h·w, D)` of any layer and a `grid` (h, w) → `(B, D, h, w)`."""
        return tokens[:, self.family.prefix_tokens :].transpose(1, 2).unflatten(2, grid)

    def view(
        self, pixel_values: torch.Tensor, patch_size: int, shared_states: tuple[torch.Tensor, ...] | None = None
    ) -> BranchView:
        """What the branch sees in `(B, 3, H, W)` images, sides multiples of the patch. No head runs."""
        tokens, hidden_states, _ = self.encode(pixel_values, shared_states)
        layers = (self.auxiliary_layer_index, *self.additional_cam_layers)
        features = (tokens, *map(hidden_states.__getitem__, layers))
        grid = token_grid(pixel_values, patch_size)
        return BranchView(self, self.class_token(tokens), tuple(self.patch_map(maps, grid) for maps in features))

    def view_of(self, output: SynerNetBranchOutput) -> BranchView:
        """The result of `view` from the `output` of `forward` for the same images, without gradient."""
        grid = output.features.shape[-2:]
        earlier = [self.patch_map(output.hidden_states[layer], grid) for layer in self.additional_cam_layers]
        features = (output.features, output.auxiliary_features, *earlier)
        return BranchView(self, output.class_token.detach(), tuple(maps.detach() for maps in features))

    def forward(
        self,
        pixel_values: torch.Tensor,
        patch_size: int,
        shared_states: tuple[torch.Tensor, ...] | None = None,
        output_attentions: bool = False,
        decode: bool = True,
    ) -> SynerNetBranchOutput:
        """`(B, 3, H, W)` images, sides multiples of the patch → everything the branch computes; not `decode`: no logits."""
        tokens, hidden_states, attentions = self.encode(pixel_values, shared_states, output_attentions)
        grid = token_grid(pixel_values, patch_size)
        features, auxiliary = (
            self.patch_map(maps, grid) for maps in (tokens, hidden_states[self.auxiliary_layer_index])
        )
        scores, cam_logits = self.cam_head(features)
        auxiliary_scores, auxiliary_cam_logits = self.auxiliary_cam_head(auxiliary)
        class_token = self.class_token(tokens)
        return SynerNetBranchOutput(
            classification_logits=scores,
            auxiliary_classification_logits=auxiliary_scores,
            class_token_logits=None if self.class_token_head is None else self.class_token_head(class_token),
            cam_logits=cam_logits,
            auxiliary_cam_logits=auxiliary_cam_logits,
            logits=self.decode_head(features) if decode else None,
            features=features,
            auxiliary_features=auxiliary,
            class_token=class_token,
            hidden_states=hidden_states,
            attentions=attentions,
        )


class SynerNetPreTrainedModel(PreTrainedModel):
    """Weight initialisation and loading for every SynerNet model."""

    config: SynerNetConfig
    base_model_prefix = "synernet"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _no_split_modules = ["SynerNetBranch", "SynerNetSharedEncoder"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, SynerNetProjectionHead):
            init.zeros_(module.prototypes)

    def load_state_dict(self, state_dict: dict[str, torch.Tensor], *args, **kwargs):
        """Also takes the names of saved files, as a stock `Trainer` reads them from its checkpoints."""
        return super().load_state_dict(with_current_names(self, state_dict), *args, **kwargs)


class SynerNetModel(SynerNetPreTrainedModel):
    """The broad and the precise branch, without losses."""

    def __init__(self, config: SynerNetConfig):
        super().__init__(config)
        depth = config.backbone_config.num_hidden_layers
        chosen = [("confidence_layers", index) for index in config.confidence_layers or ()]
        for name, index in [("auxiliary_layer_index", config.auxiliary_layer_index), *chosen]:
            if not -depth - 1 <= index <= depth:
                raise ValueError(f"`{name}` must pick out of the encoder's {depth + 1} hidden states, got {index}.")
        if config.shared_encoder_layers >= depth:
            raise ValueError(
                f"`shared_encoder_layers` must leave each branch one of the encoder's {depth} blocks, got "
                f"{config.shared_encoder_layers}."
            )
        self.shared_encoder = SynerNetSharedEncoder(config) if config.shared_encoder_layers else None
        self.broad_branch = SynerNetBranch(config, config.broad_pooling_top_k or config.pooling_top_k)
        self.precise_branch = SynerNetBranch(config, config.pooling_top_k)
        self.post_init()

    @property
    def pair(self) -> BranchPair[SynerNetBranch]:
        """`BranchPair[SynerNetBranch]`: both branches."""
        return BranchPair(self.broad_branch, self.precise_branch)

    def get_input_embeddings(self) -> nn.Module:
        """The patch embedding of the shared blocks, else of the broad branch; the precise one has its own."""
        return (self.shared_encoder or self.broad_branch).backbone.get_input_embeddings()

    def pad(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Pads `(B, 3, H, W)` right and bottom with 0, the mean colour, to multiples of the patch; B is at least 1."""
        if pixel_values.shape[0] == 0:
            raise ValueError("Got a batch of no images; give at least one.")
        patch_size = self.config.patch_size
        missing = [-side % patch_size for side in pixel_values.shape[-2:]]
        return F.pad(pixel_values, (0, missing[1], 0, missing[0])) if any(missing) else pixel_values

    def load_encoder(self, backbone: nn.Module):
        """Copies the weights of `backbone`, a whole encoder, into the shared blocks and both branches."""
        if self.shared_encoder is not None:
            copy_encoder(backbone, self.shared_encoder.backbone)
        for branch in self.pair:
            copy_encoder(backbone, branch.backbone, self.config.shared_encoder_layers)

    def shared_states(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...] | None:
        """States of the shared blocks for padded images `(B, 3, H, W)`; `None` where no blocks are shared."""
        return None if self.shared_encoder is None else self.shared_encoder(pixel_values)

    def cam_logits(self, pixel_values: torch.Tensor, plain: bool = False) -> BranchPair[tuple[torch.Tensor, ...]]:
        """
        CAM logits `(B, C, h, w)` per branch and layer (last, auxiliary, `config.additional_cam_layers`) for images
        `(B, 3, H, W)`, on the token grid of the padded image, propagated where configured unless `plain`. No decoder.
        """
        _, [view] = read_views(self, pixel_values)
        return self.view_cam_logits(view, plain)

    def seen_in(self, outputs: SynerNetModelOutput, size: tuple[int, int]) -> dict:
        """What [`read_views`] need not encode again after `outputs` of `forward` for images of `size`."""
        pairs = zip(BranchPair._fields, self.pair, outputs.pair, strict=True)
        return {(size, size, False): {name: branch.view_of(output) for name, branch, output in pairs}}

    def view_cam_logits(self, view: BranchPair[BranchView], plain: bool) -> BranchPair[tuple[torch.Tensor, ...]]:
        """CAM logits `(B, C, h, w)` of a view per branch and layer, propagated where configured unless `plain`."""
        temperatures = (self.config.broad_propagation_temperature, self.config.precise_propagation_temperature)
        alike, spread = None, []
        for own, temperature in zip(view, temperatures, strict=True):
            maps = own.cam_logits()
            if temperature is not None and not plain:
                alike = alike or list(map(joint_features, view.broad.features, view.precise.features))
                maps = [propagate_cams(cam, features, temperature) for cam, features in zip(maps, alike, strict=True)]
            spread.append(tuple(maps))
        return BranchPair(*spread)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.FloatTensor,
        branches: tuple[str, ...] = BranchPair._fields,
        output_hidden_states: bool | list[int] | None = None,
        output_attentions: bool | None = None,
        pixel_mask: torch.Tensor | None = None,
        decode: bool = True,
        **kwargs,
    ) -> SynerNetModelOutput:
        r"""
        Args:
            pixel_values (`torch.FloatTensor` of shape `(B, 3, H, W)`): normalised, of any size; see `pad`.
            branches (`tuple[str, ...]`, *optional*, defaults to both): which branches to run.
            output_hidden_states (`bool` or `list[int]`, *optional*): whether to return hidden states, or which of them.
            output_attentions (`bool`, *optional*): whether to return attention maps.
            pixel_mask (`torch.Tensor` of shape `(B, H, W)`, *optional*): what an image processor that pads hands out;
                not used here.
            decode (`bool`, *optional*, defaults to `True`): whether to run the decoders; without, `logits` are `None`.

        Raises:
            ValueError: if attention maps are asked of a model whose branches share blocks.
            TypeError: if an argument is unknown.
        """
        check_keywords(kwargs, SynerNetModel.forward)
        keep_states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        keep_attentions = self.config.output_attentions if output_attentions is None else output_attentions
        if keep_attentions and self.shared_encoder is not None:
            raise ValueError("Attention maps need `shared_encoder_layers` = 0; leave out output_attentions.")
        pixel_values = self.pad(pixel_values.to(self.dtype))
        shared_states = self.shared_states(pixel_values)
        arguments = (pixel_values, self.config.patch_size, shared_states, bool(keep_attentions), decode)
        pair = BranchPair(
            *(branch(*arguments) if name in branches else None for name, branch in self.pair._asdict().items())
        )
        ran = [output for output in pair if output is not None]
        states = tuple(state for output in ran for state in output.hidden_states)
        return SynerNetModelOutput(
            last_hidden_state=torch.cat([output.tokens for output in ran], dim=-1),
            hidden_states=select_states(states, keep_states),
            attentions=tuple(item for output in ran for item in output.attentions) if keep_attentions else None,
            broad=pair.broad,
            precise=pair.precise,
        )


class SynerNetForWeaklySupervisedSegmentation(SynerNetPreTrainedModel):
    """SynerNet with its losses: learns from image-level labels, predicts segmentation and CAMs."""

    # a Trainer then divides the loss by its accumulation steps itself and hands in no `num_items_in_batch`
    accepts_loss_kwargs = False

    def __init__(self, config: SynerNetConfig):
        super().__init__(config)
        if config.num_foreground_labels < 1:
            raise ValueError(
                f"SynerNet needs background and at least one class, got {config.num_labels} labels; set `id2label`."
            )
        self.synernet = SynerNetModel(config)
        self.post_init()

    @classmethod
    def from_backbone_pretrained(
        cls,
        name_or_path: str,
        num_labels: int | None = None,
        id2label: dict[int, str] | None = None,
        backbone_overrides: dict | None = None,
        dtype: torch.dtype | None = None,
        **config_fields,
    ) -> "SynerNetForWeaklySupervisedSegmentation":
        r"""
        Builds a SynerNet whose two encoders have the weights of a pretrained ViT; the heads are drawn at random.

        Args:
            name_or_path (`str`): Hub id or folder of an encoder of one of the families that work, for example
                `google/vit-base-patch16-224`.
            num_labels (`int`, *optional*): number of labels with background, unless `id2label` is given.
            id2label (`dict[int, str]`, *optional*): label names, 0 the background.
            backbone_overrides (`dict`, *optional*): encoder config fields to change, for example `qkv_bias`; weights
                that then have no place are dropped, as in the authors' code.
            dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): of the whole model, whatever the checkpoint's.
            config_fields: further fields of [`SynerNetConfig`].

        Returns:
            [`SynerNetForWeaklySupervisedSegmentation`]

        Raises:
            ValueError: if neither `num_labels` nor `id2label` is given, a field of either configuration is unknown, or the
                encoder is of a family that cannot work.
            OSError: if the encoder cannot be found.
        """
        if id2label is None and num_labels is None:
            raise ValueError("Got neither num_labels nor id2label; pass one, counting background as label 0.")
        if id2label is not None and num_labels not in (None, len(id2label)):
            raise ValueError(
                f"Got num_labels={num_labels} and an id2label with {len(id2label)} labels; pass one of them."
            )
        unknown = sorted(set(config_fields) - set(inspect.signature(SynerNetConfig).parameters))
        if unknown:
            raise ValueError(f"SynerNetConfig has no field {', '.join(unknown)}; see its documentation for the names.")
        backbone = pretrained_encoder(name_or_path, backbone_overrides)
        labels = {"id2label": id2label} if id2label is not None else {"num_labels": num_labels}
        model = cls(SynerNetConfig(backbone_config=backbone.config, **labels, **config_fields))
        model.synernet.load_encoder(backbone)
        return model if dtype is None else model.to(dtype)

    def cam_logits(self, pixel_values: torch.Tensor, plain: bool = False) -> BranchPair[tuple[torch.Tensor, ...]]:
        """See [`SynerNetModel.cam_logits`]."""
        return self.synernet.cam_logits(pixel_values, plain)

    @torch.no_grad()
    def class_scores(self, pixel_values: torch.FloatTensor, seen: dict | None = None) -> torch.Tensor:
        """
        Scores `(B, C)` of the classes in images `(B, 3, H, W)`, as `classification_logits` of `forward`. `seen` as in
        `multi_scale_logits`.
        """
        _, [view] = read_views(self.synernet, pixel_values, seen=seen)
        return self._class_scores(view)

    @torch.no_grad()
    def generate_cams(
        self,
        pixel_values: torch.FloatTensor,
        labels: torch.Tensor | None = None,
        scales: tuple[float, ...] | None = None,
        flip: bool | None = None,
        plain: bool = False,
        all_classes: bool = True,
        seen: dict | None = None,
    ) -> SynerNetCamOutput:
        r"""
        Multi-scale CAMs of both branches and their fusion, without gradient.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(B, 3, H, W)`): normalised images of any size.
            labels (`torch.Tensor` of shape `(B, C)`, *optional*): multi-hot; the maps of absent classes are 0.
            scales (`tuple[float, ...]`, *optional*, defaults to `config.cam_scales`): factors of height and width.
            flip (`bool`, *optional*, defaults to `config.cam_flip`): whether to use the mirrored image too.
            plain (`bool`, *optional*, defaults to `False`): leave out propagation and consensus, as for a baseline.
            all_classes (`bool`, *optional*, defaults to `True`): `False`: maps of `present_classes(labels)` only.
            seen (`dict`, *optional*): as in `multi_scale_logits`.

        Returns:
            [`SynerNetCamOutput`]
        """
        if labels is not None:
            self._check_labels(labels, pixel_values)
        scales = self.config.cam_scales if scales is None else scales
        flip = self.config.cam_flip if flip is None else flip
        present = None if labels is None else present_classes(labels)
        cams = multi_scale_cams(self, pixel_values, present, scales, flip, plain, seen)
        own = torch.ones_like(cams.broad[0][..., 0, 0]) if present is None else present.mask.float()
        fused, confidence = fuse_branches(self.config, cams, own)
        maps = [cams.broad[0], cams.precise[0], cams.broad[1], cams.precise[1], 0.5 * (fused.broad + fused.precise)]
        if present is not None and all_classes:
            maps = [spread_classes(cam, present, labels.shape[1]) for cam in maps]
        return SynerNetCamOutput(*maps, confidence)

    @torch.no_grad()
    def multi_scale_logits(
        self,
        pixel_values: torch.FloatTensor,
        scales: tuple[float, ...] | None = None,
        flip: bool = False,
        inference_branches: str | None = None,
        class_prior_weight: float | None = None,
        seen: dict | None = None,
    ) -> torch.Tensor:
        r"""
        Segmentation logits at the size of the input: the elementwise maximum over scales (authors' code). The class prior
        is that of all views together (ours).

        Args:
            pixel_values (`torch.FloatTensor` of shape `(B, 3, H, W)`): normalised images of any size.
            scales (`tuple[float, ...]`, *optional*, defaults to `config.inference_scales`): factors of the sides.
            flip (`bool`, *optional*, defaults to `False`): whether to use the mirrored image too.
            inference_branches (`str`, *optional*): as in `forward`.
            class_prior_weight (`float`, *optional*, defaults to `config.class_prior_weight`): 0 for known classes.
            seen (`dict`, *optional*): Empty at first, it keeps what the encoders give for each view, which another call
                with it and the same images need not compute again.

        Returns:
            `torch.Tensor` of shape `(B, K, H, W)`: float32.
        """
        size, branches = tuple(pixel_values.shape[-2:]), chosen_branches(inference_branches)
        maps, likely, best = [], [], None
        for scale in self.config.inference_scales if scales is None else scales:
            view_size, views = read_views(self.synernet, pixel_values, scale, flip, branches=branches, seen=seen)
            maps += [(view_size, mirrored, self._mix(view)) for mirrored, view in enumerate(views)]
            likely += map(self._likely, views)
        for view_size, mirrored, logits in maps:
            # all views together say which classes there are: one that is wrong about it would win everywhere
            logits = self._with_prior(logits, likely, class_prior_weight).float()
            logits = crop_to_input(logits, view_size, self.config.patch_size)
            logits = logits.flip(-1) if mirrored else logits
            logits = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
            best = logits if best is None else torch.maximum(best, logits)
        return best

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.FloatTensor,
        labels: torch.Tensor | None = None,
        valid_boxes: torch.Tensor | None = None,
        loss_weights: dict[str, float] | None = None,
        training_progress: float | None = None,
        inference_branches: str | None = None,
        output_hidden_states: bool | list[int] | None = None,
        output_attentions: bool | None = None,
        pixel_mask: torch.Tensor | None = None,
        gather_embeddings: Callable | None = None,
        max_labels: int | None = None,
        draws: Sequence[int] | None = None,
        sum_counts: Callable | None = None,
        **kwargs,
    ) -> SynerNetSegmenterOutput:
        r"""
        Args:
            pixel_values (`torch.FloatTensor` of shape `(B, 3, H, W)`):
                Images normalised with `config.image_mean` and `config.image_std`, of any size.
            labels (`torch.Tensor` of shape `(B, num_labels - 1)`, *optional*):
                Image-level labels, multi-hot over the foreground classes. With them the loss is computed.
            valid_boxes (`torch.LongTensor` of shape `(B, 4)`, *optional*): [top, bottom, left, right) of real pixels.
            loss_weights (`dict[str, float]`, *optional*, defaults to `config.loss_weights`):
                Weights of `cls`, `cls_aux`, `cls_token`, `spatial_bce` (the share of the spatial term in the classification
                term of its branches), `patch_contrast`, `prototype_contrast`, `segmentation`; 0 or no name: not computed.
            training_progress (`float`, *optional*, defaults to 0): t/T in [0, 1], for the coverage schedule.
            inference_branches (`str`, *optional*, defaults to `"both"`): or `"broad"`, `"precise"`; training needs both.
            output_hidden_states (`bool` or `list[int]`, *optional*): whether to return hidden states, or which of them.
            output_attentions (`bool`, *optional*): whether to return attention maps; they need eager attention.
            pixel_mask (`torch.Tensor` of shape `(B, H, W)`, *optional*): 1 on real pixels, for `valid_boxes`.
            gather_embeddings (`Callable`, *optional*): Collects embeddings `(n, P)` and class ids `(n,)` of all processes,
                which then have equal prototypes; returns both and the `slice` of the own rows. `None`: the own batch alone.
            max_labels (`int`, *optional*): Classes of the image that has most; reading it off `labels` waits for the device.
            draws (`Sequence[int]`, *optional*): A random number from 0 per image, which chooses the class of its instance.
            sum_counts (`Callable`, *optional*): Sums a tensor of counts over all processes and returns it with their number,
                so that the losses of all have the mean of one batch of all images. `None`: the own batch alone.

        Returns:
            [`SynerNetSegmenterOutput`]

        Raises:
            ValueError: if `labels` do not have one row per image and `config.num_foreground_labels` columns, a name
                in `loss_weights` or `inference_branches` is unknown, or `labels` come with a single branch.
            TypeError: if an argument is unknown.
        """
        # handed in by training loops that normalise by items, which image-level losses do not
        kwargs.pop("num_items_in_batch", None)
        check_keywords(kwargs, SynerNetForWeaklySupervisedSegmentation.forward)
        branches, size = chosen_branches(inference_branches), tuple(pixel_values.shape[-2:])
        if labels is not None:
            if len(branches) == 1:
                raise ValueError(f"Training needs both branches, got inference_branches={branches[0]!r} with labels.")
            self._check_labels(labels, pixel_values)
            if valid_boxes is None and pixel_mask is not None:
                valid_boxes = masks_to_boxes(pixel_mask)

        weights = self.config.loss_weights if loss_weights is None else loss_weights
        # a training step before its gate opens: nothing reads the decoders
        decode = not self.training or labels is None or bool(weights.get("segmentation"))
        asked = (output_hidden_states, output_attentions)
        outputs = self.synernet(pixel_values, branches, *asked, return_dict=True, decode=decode)
        mixed, scores = self._mix(outputs.pair), self._class_scores(outputs.pair)
        mixed = self._with_prior(mixed, [self._likely(outputs.pair)])
        logits = BranchPair(*(self._at_input(output, "logits", size) for output in outputs.pair))
        objective, cams = SynerNetObjective(), BranchPair(None, None)
        if labels is not None:
            seen = (self.synernet, pixel_values, outputs, logits, labels, valid_boxes)
            progress = float(training_progress or 0.0)
            objective = batch_objective(*seen, weights, progress, gather_embeddings, max_labels, draws, sum_counts)
        if not self.training:
            maps = [self._at_input(output, "cam_logits", size) for output in outputs.pair]
            cams = BranchPair(*(None if cam is None else normalize_cams(cam.detach().relu()) for cam in maps))
        return SynerNetSegmenterOutput(
            loss=objective.loss,
            loss_dict=objective.loss_dict,
            logits=None if mixed is None else at_input_size(mixed, size, self.config.patch_size),
            broad_logits=logits.broad,
            precise_logits=logits.precise,
            classification_logits=scores,
            broad_cams=cams.broad,
            precise_cams=cams.precise,
            confidence=objective.confidence,
            pseudo_labels=objective.pseudo_labels,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _at_input(self, output: SynerNetBranchOutput | None, name: str, size: tuple[int, int]) -> torch.Tensor | None:
        maps = None if output is None else output.get(name)
        return None if maps is None else at_input_size(maps, size, self.config.patch_size)

    def _shares(self, pair: BranchPair) -> list[tuple[float, SynerNetBranchOutput | BranchView]]:
        """The branches that ran, each with its share in what they say together."""
        share = self.config.broad_share_in_logits
        ran = [(part, output) for part, output in zip((share, 1 - share), pair, strict=True) if output is not None]
        return [(1.0, ran[0][1])] if len(ran) == 1 else ran

    def _mix(self, pair: BranchPair) -> torch.Tensor | None:
        """Segmentation logits `(B, K, h, w)` of the branches that ran, mixed; `None` without decoders."""
        maps = [(share, output.logits) for share, output in self._shares(pair)]
        return None if maps[0][1] is None else sum(share * logits for share, logits in maps)

    def _likely(self, pair: BranchPair) -> torch.Tensor | None:
        """Log-probabilities `(B, C)` that the class tokens of the branches that ran give; `None` without their heads."""
        if not self.config.with_class_token_head:
            return None
        return sum(share * F.logsigmoid(output.class_token_logits) for share, output in self._shares(pair))

    def _with_prior(
        self, logits: torch.Tensor | None, likely: list, weight: float | None = None
    ) -> torch.Tensor | None:
        """Mixed `logits` with the class prior of the mean of the log-probabilities in `likely`."""
        if logits is None or likely[0] is None:
            return logits
        weight = self.config.class_prior_weight if weight is None else weight
        return lower_unlikely_classes(logits, sum(likely) / len(likely), weight)

    def _class_scores(self, pair: BranchPair) -> torch.Tensor:
        """Class scores `(B, C)` of the branches that ran, their mean."""
        name = "class_token_logits" if self.config.with_class_token_head else "classification_logits"
        scores = [getattr(output, name) for output in pair if output is not None]
        return sum(scores) / len(scores)

    def _check_labels(self, labels: torch.Tensor, pixel_values: torch.Tensor):
        expected = (pixel_values.shape[0], self.config.num_foreground_labels)
        if tuple(labels.shape) != expected:
            raise ValueError(
                f"labels must be multi-hot, one row per image and one column per class without background: {expected}, "
                f"got {tuple(labels.shape)}."
            )


__all__ = [
    "SynerNetBranchOutput",
    "SynerNetCamOutput",
    "SynerNetForWeaklySupervisedSegmentation",
    "SynerNetModel",
    "SynerNetModelOutput",
    "SynerNetPreTrainedModel",
    "SynerNetSegmenterOutput",
]
