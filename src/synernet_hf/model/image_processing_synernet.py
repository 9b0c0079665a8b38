"""Image processor of SynerNet: images and masks to tensors, and the model's outputs back to label maps."""

import base64
import functools
import io
import os
import urllib.parse
import urllib.request
from collections.abc import Iterator
from http.client import HTTPException

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_outputs import SemanticSegmentationPostProcessorOutput
from transformers.image_processing_utils import BatchFeature
from transformers.image_transforms import get_resize_output_image_size, get_size_with_aspect_ratio
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    ChannelDimension,
    ImageInput,
    PILImageResampling,
    SizeDict,
    get_image_size_for_max_height_width,
    infer_channel_dimension_format,
)
from transformers.processing_utils import ImagesKwargs, Unpack
from transformers.utils import TensorType, logging


logger = logging.get_logger(__name__)
# what goes wrong when an image is read
UNREADABLE = (OSError, SyntaxError, TypeError, ValueError, HTTPException, Image.DecompressionBombError)
# values of float32 that the way back resizes at once: 64 MiB
CHUNK_VALUES = 2**24


class SynerNetImageProcessorKwargs(ImagesKwargs, total=False):
    r"""
    size_divisor (`int`, *optional*, defaults to `self.size_divisor`): see [`SynerNetImageProcessor`].
    max_pixels (`int`, *optional*, defaults to `self.max_pixels`): see [`SynerNetImageProcessor`].
    """

    size_divisor: int
    max_pixels: int | None


class SynerNetImageProcessor(PilBackend):
    r"""
    Image processor of SynerNet on PIL and NumPy.

    By default an image of up to `max_pixels` keeps its native size, as in the authors' evaluation, and is scaled to
    [0, 1] and normalised with the mean and standard deviation of ImageNet. The model itself pads what is not a
    multiple of its patch, so a single image needs neither resizing nor padding; a batch of several sizes needs one of
    the two. Images are read as [`open_image`] describes.

    Masks come back as `mask`, for scoring: the model does not know them, and its `labels` are image-level classes. Take
    them out before `model(**inputs)` with `mask = inputs.pop("mask")`. `do_pad` adds `pixel_mask`, with which the model
    leaves the padding out of its losses. `logits` and CAMs cover the padding as if it were image, so cut it off: a
    label map of the padded size is that of the image in its first `height` rows and `width` columns.

    Arguments are those of transformers' image processors; these have defaults or a meaning of their own:

    Args:
        do_resize (`bool`, *optional*, defaults to `False`): Resize the image to `size`, with `resample` (`BILINEAR`),
            and its mask with `NEAREST`.
        size (`dict[str, int]`, *optional*, defaults to `{"shortest_edge": 448}`): `{"shortest_edge": s}` keeps the
            proportions, `{"height": h, "width": w}` does not. 448 is the authors' crop.
        do_rescale (`bool`, *optional*, defaults to `True`): Multiply the values 0 to 255 by `rescale_factor`.
        do_pad (`bool`, *optional*, defaults to `False`): Pad images at the right and the bottom with 0 (after
            normalisation), masks with 255, up to the largest height and width of the batch rounded up to a multiple of
            `size_divisor`, or up to `pad_size`.
        size_divisor (`int`, *optional*, defaults to 16): The multiple; the patch size of the model.
        do_convert_rgb (`bool`, *optional*, defaults to `True`): Convert arrays to RGB first; files and PIL images
            always are.
        max_pixels (`int`, *optional*, defaults to 1048576): Bound on the number of pixels, which bounds the memory: a
            larger image is shrunk with `BOX`, its mask with `NEAREST`, before anything else, and a `size` of more
            pixels is reduced in proportion. `target_sizes` of `post_process_*` gives label maps of the full size.
            `None` sets no bound.

    Example:

    ```python
    >>> from PIL import Image

    >>> processor = SynerNetImageProcessor()
    >>> processor(Image.new("RGB", (60, 40)), return_tensors="pt")["pixel_values"].shape
    torch.Size([1, 3, 40, 60])
    ```
    """

    valid_kwargs = SynerNetImageProcessorKwargs
    model_input_names = ["pixel_values"]
    resample = PILImageResampling.BILINEAR
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    size = {"shortest_edge": 448}
    default_to_square = False
    do_resize = False
    do_rescale = True
    rescale_factor = 1 / 255
    do_normalize = True
    do_pad = False
    size_divisor = 16
    max_pixels = 2**20
    do_convert_rgb = True

    def __init__(self, **kwargs: Unpack[SynerNetImageProcessorKwargs]):
        super().__init__(**kwargs)

    def preprocess(
        self,
        images: ImageInput,
        segmentation_maps: ImageInput | None = None,
        **kwargs: Unpack[SynerNetImageProcessorKwargs],
    ) -> BatchFeature:
        """
        Prepare images, and their masks when given, for the model.

        Args:
            images (`ImageInput`): One image or a list, each as [`open_image`] takes it; or one array or tensor with a
                batch of images of equal size. Without `do_rescale` the values of arrays stay as they are.
            segmentation_maps (`ImageInput`, *optional*): One mask or a list, in the order and of the sizes of
                `images`: palette or greyscale PIL, the path of such a file, or an array of shape `(height, width)`; 0
                = background, 255 = ignore.
            kwargs ([`SynerNetImageProcessorKwargs`]): Any argument of the constructor for this call only, and
                `return_tensors` (`"pt"` or `"np"`).

        Returns:
            `BatchFeature`: `pixel_values`, float32 of shape `(batch_size, 3, height, width)`; with segmentation maps
            `mask`, int64 of shape `(batch_size, height, width)` (transformers' own processors say `labels`; our
            choice); with `do_pad` `pixel_mask`, int64 of that shape, 1 on the image and 0 on the padding.

        Raises:
            ValueError: If an image cannot be read, the number or the size of the masks is not that of the images,
                a mask has colours instead of ids, `size_divisor` is not positive, or `return_tensors` is set and the
                sizes differ.
        """
        return super().preprocess(images, segmentation_maps, **kwargs)

    def _preprocess_image_like_inputs(
        self,
        images: ImageInput,
        segmentation_maps: ImageInput | None,
        do_convert_rgb: bool,
        input_data_format: ChannelDimension | None,
        return_tensors: str | TensorType | None,
        **kwargs,
    ) -> BatchFeature:
        read = functools.partial(
            _read, scale=kwargs["do_rescale"], to_image=do_convert_rgb, input_data_format=input_data_format
        )
        images = self._prepare_image_like_inputs(
            images=_each(images, read), do_convert_rgb=do_convert_rgb, input_data_format=input_data_format
        )
        data = self._preprocess(images, **kwargs)
        if segmentation_maps is not None:
            masks = self._prepare_image_like_inputs(
                images=_each(segmentation_maps, _opened_mask),
                expected_ndims=2,
                do_convert_rgb=False,
                input_data_format=ChannelDimension.FIRST,
            )
            _check_masks(images, masks)
            mask_kwargs = kwargs | {"do_rescale": False, "do_normalize": False, "resample": PILImageResampling.NEAREST}
            masks = self._preprocess(masks, fill_value=255, **mask_kwargs)["pixel_values"]
            data["mask"] = [mask.squeeze(0).astype(np.int64) for mask in masks]
        sizes = sorted({image.shape[-2:] for image in data["pixel_values"]})
        if return_tensors is not None and len(sizes) > 1:
            raise ValueError(
                f"The images have {len(sizes)} sizes (height, width), such as {sizes[0]} and {sizes[-1]}, "
                "but one tensor needs one size: pass them singly, set `do_pad=True`, or `do_resize=True` with a "
                "height and a width."
            )
        return BatchFeature(data=data, tensor_type=return_tensors)

    def _preprocess(
        self,
        images: list[np.ndarray],
        do_resize: bool,
        size: SizeDict,
        do_pad: bool,
        pad_size: SizeDict | None,
        fill_value: int = 0,
        **kwargs,
    ) -> dict[str, list[np.ndarray]]:
        # Padding comes after normalisation: 0 there is the mean colour, which is what the model pads with.
        processed = []
        for image in images:
            bounded = bounded_size(image.shape[-2:], kwargs["max_pixels"])
            if bounded != image.shape[-2:]:
                # only masks are filled with something
                resample = PILImageResampling.NEAREST if fill_value else PILImageResampling.BOX
                image = self.resize(image, SizeDict(height=bounded[0], width=bounded[1]), resample)
            if do_resize:
                target = _resized_size(image, size)
                bounded = bounded_size(target, kwargs["max_pixels"])
                reduced = size if bounded == target else SizeDict(height=bounded[0], width=bounded[1])
                image = self.resize(image, reduced, kwargs["resample"])
            if kwargs["do_center_crop"]:
                # the library fills with 0 where the crop is larger than the image
                shifted = image.astype(np.int64) - fill_value if fill_value else image
                image = self.center_crop(shifted, kwargs["crop_size"]) + fill_value
            if kwargs["do_rescale"]:
                image = self.rescale(image, kwargs["rescale_factor"])
            if kwargs["do_normalize"]:
                image = self.normalize(image, kwargs["image_mean"], kwargs["image_std"])
            processed.append(image)
        if not do_pad:
            return {"pixel_values": processed}
        if pad_size is None:
            divisor = kwargs["size_divisor"]
            if divisor < 1:
                raise ValueError(f"`size_divisor` must be positive, the patch size of the model, got {divisor}.")
            height, width = (max(image.shape[axis] for image in processed) for axis in (1, 2))
            pad_size = SizeDict(height=-(-height // divisor) * divisor, width=-(-width // divisor) * divisor)
        processed, pixel_mask = self.pad(processed, pad_size=pad_size, fill_value=fill_value, return_mask=True)
        return {"pixel_values": processed, "pixel_mask": pixel_mask}

    def post_process_semantic_segmentation(
        self,
        outputs,
        target_sizes: list[tuple[int, int]] | torch.Tensor | None = None,
        return_segmentation_scores: bool = False,
    ) -> list[torch.Tensor] | list[SemanticSegmentationPostProcessorOutput]:
        """
        Turn the logits of the model into label maps, a few classes at a time, so that memory does not grow with the
        number of classes at full size.

        Args:
            outputs ([`SynerNetSegmenterOutput`]): With `logits` of shape `(batch_size, num_labels, height, width)`.
            target_sizes (`list[tuple[int, int]]` or `torch.Tensor` of shape `(batch_size, 2)`, *optional*): Height and
                width of every label map, to which the logits are resized bilinearly before the argmax; `None` keeps
                their size.
            return_segmentation_scores (`bool`, *optional*, defaults to `False`): Return the resized logits beside each
                label map.

        Returns:
            `list[torch.Tensor]` of int64 label maps of shape `(height, width)`, or
            `list[SemanticSegmentationPostProcessorOutput]` with `segmentation` and `segmentation_scores` of shape
            `(num_labels, height, width)`.

        Raises:
            ValueError: If the number of target sizes is not the batch size.
        """
        logits = outputs.logits
        sizes = _checked_sizes(logits, target_sizes)
        label_maps = [resized_maximum(maps, size)[1] for maps, size in zip(logits, sizes, strict=True)]
        if not return_segmentation_scores:
            return label_maps
        return [
            SemanticSegmentationPostProcessorOutput(
                data={"segmentation": label_map, "segmentation_scores": resize_maps(maps, size)}
            )
            for label_map, maps, size in zip(label_maps, logits, sizes, strict=True)
        ]

    def post_process_class_activation_maps(
        self,
        cams: torch.Tensor,
        threshold: float = 0.5,
        target_sizes: list[tuple[int, int]] | torch.Tensor | None = None,
    ) -> list[torch.Tensor]:
        """
        Turn class activation maps into label maps with a single threshold, as they are scored in the paper's tables.

        Args:
            cams (`torch.Tensor` of shape `(batch_size, num_labels - 1, height, width)`): Maps of the foreground
                classes in [0, 1], zero for classes that are not in the image.
            threshold (`float`, *optional*, defaults to 0.5): A pixel whose largest value is at or below it is
                background. 0.5 is the authors' value for VOC, 0.45 for COCO (`config.background_threshold`).
            target_sizes: As for `post_process_semantic_segmentation`.

        Returns:
            `list[torch.Tensor]`: int64 label maps of shape `(height, width)`; 0 = background, class `c` of the maps
            has id `c + 1`.

        Raises:
            ValueError: If the number of target sizes is not the batch size.
        """
        label_maps = []
        for maps, size in zip(cams, _checked_sizes(cams, target_sizes), strict=True):
            values, class_ids = resized_maximum(maps, size)
            label_maps.append(torch.where(values > threshold, class_ids + 1, torch.zeros_like(class_ids)))
        return label_maps


def open_image(source, timeout: float | None = None) -> Image.Image:
    """
    Read an image as every part of this package sees it: upright, 8-bit RGB.

    The EXIF orientation of JPEG, TIFF and PNG is applied. Of an animation the first frame counts. See [`to_rgb`] for
    colour modes and [`to_8_bits`] for the depth of pixels.

    Args:
        source (`str`, `PathLike`, `bytes`, `dict`, `PIL.Image.Image`, `np.ndarray` or `torch.Tensor`): Path, URL or
            base64 text; content of a file; an undecoded `datasets.Image` (`{"bytes": …, "path": …}`); an open image,
            of which the current frame counts; or pixels of shape `(height, width, channels)`, `(channels, height,
            width)` or `(height, width)` with 1, 3 or 4 channels.
        timeout (`float`, *optional*): Seconds to wait for a URL.

    Returns:
        `PIL.Image.Image`: Mode `RGB`, with the pixels loaded.

    Raises:
        ValueError: If the image cannot be read, or the range of its values is unknown.
    """
    if isinstance(source, np.ndarray | torch.Tensor):
        return _image_of(to_8_bits(_array_of(source)))
    if isinstance(source, dict):
        content = source.get("bytes")
        source = content if content is not None else source.get("path")
    try:
        image = ImageOps.exif_transpose(source) if isinstance(source, Image.Image) else _opened(source, timeout)
    except UNREADABLE as error:
        # of other errors the libraries tell no more than that
        reason = f" ({error})" if isinstance(error, Image.DecompressionBombError) else ""
        raise ValueError(
            f"The image {_name(source)} cannot be read{reason}; expected is the path or URL of an image file."
        ) from error
    try:
        return to_rgb(image)
    except ValueError as error:
        raise ValueError(f"The image {_name(source)} cannot be used. {error}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """
    Give an image 8-bit colours.

    Args:
        image (`PIL.Image.Image`): Any mode. Modes of more than 8 bits (`I`, `I;16`, `F`) become 8 bits as [`to_8_bits`]
            says; Pillow alone cuts them off at 255. Alpha and the transparent colour of a palette are dropped: a
            transparent pixel shows the colour that it stores. CMYK is converted by Pillow, without a colour profile.

    Returns:
        `PIL.Image.Image`: Mode `RGB`.

    Raises:
        ValueError: If the range of the values is unknown.
    """
    if image.mode[0] in "IF":
        image = Image.fromarray(to_8_bits(np.asarray(image)))
    return image.convert("RGB")


def to_8_bits(values: np.ndarray) -> np.ndarray:
    """
    Pixel values of any kind as uint8, with black at 0 and white at 255.

    White is 255 in uint8, 65535 in uint16 and 1 in bool. In wider integers and floats the values tell: floats up to 1
    (and 1 in 100 beyond, which is clipped) have white at 1, values up to 255 at 255, values up to 65535 at 65535. Values of 16 bits are divided by 256.

    Raises:
        ValueError: If a value is negative, above 65535 or not finite.
    """
    if values.dtype == np.uint8:
        return values
    if values.dtype.kind not in "buif":
        raise ValueError(f"Pixel values are {values.dtype}; numbers are expected.")
    if values.dtype.kind == "f" and 1 < values.max() <= 1.01 and values.min() >= -0.01:
        # what resizing leaves of a range of 0 to 1
        values = values.clip(0, 1)
    low, high = values.min(), values.max()
    # nan compares false
    if not (low >= 0 and high <= 65535):
        raise ValueError(
            f"Pixel values range from {low:g} to {high:g}; known ranges are 0 to 1 (floats), 0 to 255 and 0 to 65535: "
            "scale them to one of these."
        )
    if values.dtype == bool or (values.dtype.kind == "f" and high <= 1):
        return np.rint(values * np.float32(255)).astype(np.uint8)
    is_16_bit = values.dtype.kind == "u" and values.dtype.itemsize == 2
    if high <= 255 and not is_16_bit:
        return np.rint(values).astype(np.uint8)
    if high < 4096:
        logger.warning_once(
            f"Values up to {high:g} are read as 16 bits, which gives a dark image; multiply images of 12 bits by 16."
        )
    return (values // 256).astype(np.uint8)


def bounded_size(size: tuple[int, int], max_pixels: int | None) -> tuple[int, int]:
    """
    Height and width of the same proportions with `max_pixels` pixels at most; a side has one pixel at least.

    Raises:
        ValueError: If `max_pixels` is not positive.
    """
    height, width = size
    if max_pixels is None:
        return height, width
    if max_pixels < 1:
        raise ValueError(f"`max_pixels` is {max_pixels}; a positive number of pixels is expected, or None.")
    factor = (max_pixels / (height * width)) ** 0.5
    if factor >= 1:
        return height, width
    # where the shorter side would be less than one pixel, the longer one takes all
    return tuple(max(1, min(int(side * factor), int(max_pixels))) for side in (height, width))


def resize_maps(maps: torch.Tensor, size: tuple[int, int] | None) -> torch.Tensor:
    """Maps of one image `(channels, h, w)` at `size` = (height, width), bilinear, float32; `None` keeps their size."""
    if size is None or tuple(maps.shape[-2:]) == tuple(size):
        return maps.float()
    return F.interpolate(maps[None].float(), size=size, mode="bilinear", align_corners=False)[0]


def resized_chunks(maps: torch.Tensor, size: tuple[int, int] | None) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield `(first channel, maps)` of [`resize_maps`] a few channels at a time: about `CHUNK_VALUES` values."""
    height, width = maps.shape[-2:] if size is None else size
    step = max(1, CHUNK_VALUES // (height * width))
    for start in range(0, len(maps), step):
        yield start, resize_maps(maps[start : start + step], size)


def resized_maximum(maps: torch.Tensor, size: tuple[int, int] | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Largest value of each pixel and its channel, `(height, width)` float32 and int64, the first of equal ones: of maps
    `(channels, h, w)`, resized to `size` a few channels at a time. It is the maximum of [`resize_maps`], but for the
    rounding of the resize, which may depend on the number of channels.
    """
    best, channels = None, None
    for start, chunk in resized_chunks(maps, size):
        values, indices = chunk.max(dim=0)
        if best is None:
            best, channels = values, indices
        else:
            larger = values > best
            best = torch.where(larger, values, best)
            channels[larger] = indices[larger] + start
    return best, channels


def _checked_sizes(maps: torch.Tensor, target_sizes) -> list[tuple[int, int] | None]:
    if target_sizes is None:
        return [None] * len(maps)
    if len(maps) != len(target_sizes):
        raise ValueError(
            f"Got {len(target_sizes)} target sizes for a batch of {len(maps)}; one per image is expected."
        )
    return [(int(height), int(width)) for height, width in target_sizes]


def _each(inputs, function):
    """`function` of one input, or of every item of a list of them."""
    return [_each(item, function) for item in inputs] if isinstance(inputs, list | tuple) else function(inputs)


def _opened(source, timeout: float | None) -> Image.Image:
    """The upright image, in its own mode, behind a path, URL, base64 text or the content of a file."""
    text = source if isinstance(source, bytes) else os.fspath(source)
    if isinstance(text, str):
        # a path written on Windows
        text = next((path for path in (text, text.replace("\\", "/")) if os.path.isfile(path)), text)
    if isinstance(text, str) and text.startswith(("http://", "https://")):
        # not by the library, which cuts 16 bits off at 255; some servers turn nameless callers away
        address = urllib.parse.quote(text, safe="!#$%&'()*+,/:;=?@[]~")
        request = urllib.request.Request(address, headers={"User-Agent": "synernet_hf"})
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            text = answer.read()
    elif isinstance(text, str) and not os.path.isfile(text):
        text = base64.b64decode(text.rpartition(",")[2], validate=True)
    with Image.open(io.BytesIO(text) if isinstance(text, bytes) else text) as image:
        return ImageOps.exif_transpose(image)


def _name(source) -> str:
    return repr(str(source)[:200]) if isinstance(source, str | os.PathLike) else f"given as {type(source).__name__}"


def _array_of(image: np.ndarray | torch.Tensor) -> np.ndarray:
    """An array as it is, but for floats, which become float32."""
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu()
        image = (image.float() if image.is_floating_point() else image).numpy()
    return image.astype(np.float32) if image.dtype.kind == "f" else image


def _image_of(values: np.ndarray, input_data_format: ChannelDimension | str | None = None) -> Image.Image:
    """uint8 pixels in any layout → RGB."""
    if values.ndim == 3:
        layout = input_data_format or infer_channel_dimension_format(values, num_channels=(1, 3, 4))
        values = np.moveaxis(values, 0, -1) if layout == ChannelDimension.FIRST else values
        values = values[..., 0] if values.shape[-1] == 1 else values
    return Image.fromarray(np.ascontiguousarray(values)).convert("RGB")


def _read(image, scale: bool, to_image: bool, input_data_format: ChannelDimension | str | None):
    """Everything but arrays → an upright image of 8 bits; arrays likewise, unless their values or kind are to stay."""
    if not isinstance(image, np.ndarray | torch.Tensor):
        return open_image(image)
    values = to_8_bits(_array_of(image)) if scale else _array_of(image)
    if scale and to_image and values.ndim == 4:
        return [_image_of(item, input_data_format) for item in values]
    if scale and to_image:
        return _image_of(values, input_data_format)
    return values[None] if values.ndim == 2 else values


def _opened_mask(mask):
    """A path → the image in its own mode: the library would read it as RGB, and its ids would be lost."""
    if isinstance(mask, Image.Image):
        return ImageOps.exif_transpose(mask)
    if not isinstance(mask, str | os.PathLike):
        return mask
    try:
        return _opened(mask, None)
    except UNREADABLE as error:
        raise ValueError(
            f"The segmentation map {_name(mask)} cannot be read; expected is the path of a palette or greyscale image."
        ) from error


def _resized_size(image: np.ndarray, size: SizeDict) -> tuple[int, int]:
    """Height and width that the library's `resize` gives an image `(channels, height, width)`."""
    if size.shortest_edge and size.longest_edge:
        return get_size_with_aspect_ratio(image.shape[-2:], size.shortest_edge, size.longest_edge)
    if size.shortest_edge:
        return get_resize_output_image_size(
            image, size.shortest_edge, default_to_square=False, input_data_format=ChannelDimension.FIRST
        )
    if size.max_height and size.max_width:
        return get_image_size_for_max_height_width(image.shape[-2:], size.max_height, size.max_width)
    # what is no size at all is for `resize` to refuse
    return size.height or 1, size.width or 1


def _check_masks(images: list[np.ndarray], masks: list[np.ndarray]) -> None:
    if len(masks) != len(images):
        raise ValueError(f"Got {len(images)} images and {len(masks)} segmentation maps; one per image is expected.")
    for index, (image, mask) in enumerate(zip(images, masks, strict=True)):
        if mask.shape[0] != 1:
            raise ValueError(
                f"Segmentation map {index} has shape {mask.shape}, expected are ids of shape (height, width): give "
                "palette images as they are, not converted to RGB."
            )
        if mask.shape[-2:] != image.shape[-2:]:
            raise ValueError(
                f"Segmentation map {index} has height and width {mask.shape[-2:]}, its image {image.shape[-2:]}; "
                "the two must agree."
            )


__all__ = ["SynerNetImageProcessor", "open_image", "to_rgb"]
