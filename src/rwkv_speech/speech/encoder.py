"""Frozen speech encoders of the Hugging Face kind: 16 kHz waveforms -> frames.

- Three families: `_Wav2Vec2` (wav2vec 2.0, HuBERT, WavLM), `_Wav2Vec2Bert` (w2v-BERT 2.0) and `_Whisper` (the encoder
  half). Each works with the checkpoint's own feature extractor and normalisation.
- Two steps: `extract` makes the network's input of one waveform, on the CPU and without the weights, so that a loader's
  workers can do it; `encode` runs the network on a batch.
- A sample gets the same frames in any batch: nothing of a batch's padding reaches a valid frame.
- The number of frames follows from the number of samples alone (`frame_count`).
- Frozen for good: no gradients, no dropout, no layer drop, no masking; `train()` changes nothing.
"""

import functools
import math
import sys
import warnings
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from types import ModuleType
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from rwkv_speech.errors import UserError, reason
from rwkv_speech.speech.audio import SAMPLE_RATE
from rwkv_speech.speech.hub import encoder_folder, expect_on_hub, hub_is_reachable
from rwkv_speech.tensors import read_tensors

_MOST_LAYERS = 1000  # several times what any encoder has; more would be built for minutes before they are found missing
_CALL_SAMPLES = 8 * 30 * SAMPLE_RATE  # padded audio per call of the network, so that memory is bounded

# What training would do to the input, and a checkpoint's own downsampling behind the encoder: ours comes after it.
_LEFT_OUT = {
    "mask_time_prob": 0.0,
    "mask_feature_prob": 0.0,
    "use_intermediate_ffn_before_adapter": False,
    "add_adapter": False,
}


Convolutions = Sequence[tuple[int, int]]  # kernel and stride of each step on the way from samples to frames


def shortest_input(convolutions: Convolutions, frames: int = 1) -> int:
    """The samples that so many frames take at least."""
    samples = frames
    for kernel, stride in reversed(convolutions):
        samples = (samples - 1) * stride + kernel
    return samples


def frame_count(samples: int, convolutions: Convolutions) -> int:
    """The exact number of valid frames of a waveform with so many samples, at least 1."""
    frames = max(samples, shortest_input(convolutions))
    for kernel, stride in convolutions:
        frames = (frames - kernel) // stride + 1
    return frames


class SpeechEncoder(nn.Module):
    """A frozen pretrained encoder; make one by `SpeechEncoder.from_pretrained`.

    Attributes:
        name: the hub name it came from, or the folder, absolute.
        width: channels of a frame.
        convolutions: what shortens the signal, from samples to frames.
        frame_rate: frames per second.
        model: the Hugging Face network.
        feature_extractor: the Hugging Face feature extractor that belongs to it.
    """

    window: int | None = None  # longer audio is cut into pieces of this many samples
    call_samples = _CALL_SAMPLES
    key_mapping: ClassVar[dict[str, str] | None] = None  # checkpoint names -> the network's names

    def __init__(self, name: str, model: nn.Module, feature_extractor: Any, convolutions: Convolutions) -> None:
        super().__init__()
        self.name = name
        self.convolutions = convolutions
        self.frame_rate = SAMPLE_RATE / math.prod(stride for _, stride in convolutions)
        self.min_samples = shortest_input(convolutions)  # shorter audio is padded to this with zeros
        self.model = model.requires_grad_(False).eval()
        self.feature_extractor = feature_extractor
        self.width: int = model.config.hidden_size

    @staticmethod
    def from_pretrained(
        name_or_path: str, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ) -> "SpeechEncoder":
        """Load a checkpoint from a folder or from the Hugging Face hub, without running any code it brings.

        Of a checkpoint with a task head (such as CTC), the head is left out; of Whisper, the decoder.

        Args:
            name_or_path: a folder, or a name such as `microsoft/wavlm-large`.
            device: where the encoder lives.
            dtype: the type that it computes in, and of its frames.

        Raises:
            UserError: there is no such folder or model (or no network), its type is not supported, its weights are
                incomplete, or its feature extractor is absent or made for another sample rate.
        """
        return _load(name_or_path, device, dtype)

    def train(self, mode: bool = True) -> "SpeechEncoder":
        """Stay in evaluation mode, whatever the module around this one is switched to."""
        return super().train(False)

    def frame_count(self, samples: int) -> int:
        """The exact number of valid frames of a waveform with so many samples, at least 1."""
        return frame_count(samples, self.convolutions)

    @abstractmethod
    def extract(self, waveform: Tensor) -> Tensor:
        """The network's input for one waveform (samples,), floating point, 16 kHz, at least one sample, on any device.

        Returns:
            On the CPU in fp32: the checkpoint's own features, normalised as it wants. Their shape depends on
            the family; along dimension 0 those of several waveforms can be joined, and split again.
        """

    @abstractmethod
    def _network(self, features: list[Tensor]) -> Tensor:
        """One call of the network on pieces of at most `window` samples -> (B, F_max, width), padding included."""

    def _pieces(self, features: Tensor, samples: int) -> list[tuple[Tensor, int]]:
        """What `extract` made of a waveform, in pieces that the network takes, and the samples of each."""
        return [(features, samples)]

    @torch.no_grad()  # not inference_mode: the frames take part in autograd afterwards
    def encode(self, features: Sequence[Tensor], samples: Sequence[int]) -> Tensor:
        """Features that `extract` made of B waveforms with so many samples -> frames.

        Returns:
            (B, F_max, width) on the encoder's device in its type, zero beyond the `frame_count` of each. A context of
            autocast has no effect.
        """
        pieces = [self._pieces(x, n) for x, n in zip(features, samples, strict=True)]
        flat = [piece for utterance in pieces for piece in utterance]
        encoded: dict[int, Tensor] = {}
        with torch.autocast(self._device.type, enabled=False):
            for call in self._calls([n for _, n in flat]):
                for i, frames in zip(call, self._network([flat[i][0] for i in call]), strict=True):
                    encoded[i] = frames[: self.frame_count(flat[i][1])]
        rest = iter(range(len(flat)))
        return pad_sequence([torch.cat([encoded[next(rest)] for _ in x]) for x in pieces], batch_first=True)

    def forward(self, waveforms: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Args:
            waveforms: B tensors (samples_b,), floating point, 16 kHz, at least one sample each, on any device.

        Returns:
            frames (B, F_max, width), as `encode` gives them, and lengths (B,) int64: `frame_count(samples_b)`.
        """
        samples = [len(waveform) for waveform in waveforms]
        frames = self.encode([self.extract(waveform) for waveform in waveforms], samples)
        return frames, torch.tensor([self.frame_count(n) for n in samples], device=self._device)

    def _calls(self, samples: list[int]) -> Iterator[list[int]]:
        """Indices of the pieces to encode together: alike in length, and no more than `call_samples` padded."""
        order = sorted(range(len(samples)), key=lambda i: -samples[i])
        while order:
            count = max(1, self.call_samples // max(samples[order[0]], self.min_samples))
            yield order[:count]
            order = order[count:]

    def _extract(self, waveforms: list[Tensor]) -> Any:
        arrays = [waveform.float().cpu().numpy() for waveform in waveforms]
        with torch.autocast("cpu", enabled=False):
            return self.feature_extractor(arrays, sampling_rate=SAMPLE_RATE, return_tensors="pt")

    @property
    def _device(self) -> torch.device:
        return self._weight.device

    @property
    def _dtype(self) -> torch.dtype:
        return self._weight.dtype

    @property
    def _weight(self) -> Tensor:
        """Any of the weights: parameters, or buffers where training under DeepSpeed has made them constants."""
        return next(chain(self.model.parameters(), self.model.buffers()))


class _Wav2Vec2(SpeechEncoder):
    """Strided convolutions over the samples, then a transformer (wav2vec 2.0, HuBERT, WavLM).

    The convolutions run on one utterance at a time: the base models normalise over time behind the first of them
    (GroupNorm), which padding would change, and for the others it costs no more than padding does. The transformer runs
    on the batch with the mask of the valid frames, also where the feature extractor declares none.
    """

    def __init__(self, name: str, model: nn.Module, feature_extractor: Any) -> None:
        config = model.config
        super().__init__(name, model, feature_extractor, list(zip(config.conv_kernel, config.conv_stride, strict=True)))
        if getattr(config, "conv_pos_batch_norm", False):
            self.call_samples = 0  # this HuBERT variant shifts padded frames off zero again: one utterance per call

    def extract(self, waveform: Tensor) -> Tensor:
        """(samples,) -> (samples,), normalised over these, then padded where one frame takes more."""
        values = self._extract([waveform]).input_values[0]
        return F.pad(values, (0, max(0, self.min_samples - len(waveform))))

    def _network(self, features: list[Tensor]) -> Tensor:
        frames = [self.model.feature_extractor(x.to(self._device, self._dtype)[None])[0].T for x in features]
        lengths = torch.tensor([len(x) for x in frames], device=self._device)
        mask = torch.arange(max(map(len, frames)), device=self._device) < lengths[:, None]  # (B, F)
        projected = self.model.feature_projection(pad_sequence(frames, batch_first=True))
        hidden = projected if isinstance(projected, Tensor) else projected[0]  # HuBERT returns it alone
        return self.model.encoder(hidden, attention_mask=mask).last_hidden_state


class _Wav2Vec2Bert(SpeechEncoder):
    """Log-mel frames of 25 ms every 10 ms, stacked by twos, then a conformer (w2v-BERT 2.0)."""

    _FRAME, _HOP = 400, 160  # samples; fixed in the feature extractor

    def __init__(self, name: str, model: nn.Module, feature_extractor: Any) -> None:
        stack: int = feature_extractor.stride
        _check_bands(feature_extractor.feature_size * stack, model.config.feature_projection_input_dim)
        super().__init__(name, model, feature_extractor, [(self._FRAME, self._HOP), (stack, stack)])

    def extract(self, waveform: Tensor) -> Tensor:
        """(samples,) -> (F, mels * stack); a last frame that is not whole is left out."""
        features = self._extract([F.pad(waveform, (0, max(0, self.min_samples - len(waveform))))])
        return features.input_features[0][features.attention_mask[0].bool()]

    def _network(self, features: list[Tensor]) -> Tensor:
        lengths = torch.tensor([len(x) for x in features], device=self._device)
        mask = torch.arange(max(map(len, features)), device=self._device) < lengths[:, None]
        padded = pad_sequence([x.to(self._device, self._dtype) for x in features], batch_first=True)
        return self.model(input_features=padded, attention_mask=mask).last_hidden_state


class _Whisper(SpeechEncoder):
    """Log-mel frames of a 30 s window, two convolutions, then a transformer (the encoder half of Whisper).

    The network knows windows of 30 s only: shorter audio is padded with silence, as in its training, and the frames
    that hold none of it are dropped; longer audio goes through in consecutive windows.
    """

    key_mapping: ClassVar[dict[str, str]] = {r"^(model\.)?encoder\.": ""}

    def __init__(self, name: str, model: nn.Module, feature_extractor: Any) -> None:
        _check_bands(feature_extractor.feature_size, model.config.num_mel_bins)
        stride: int = feature_extractor.hop_length * model.conv1.stride[0] * model.conv2.stride[0]
        super().__init__(name, model, feature_extractor, [(1, stride)])  # a begun frame counts
        self.window = self.min_samples = feature_extractor.n_samples

    def extract(self, waveform: Tensor) -> Tensor:
        """(samples,) -> (windows, mels, frames of a window)."""
        return self._extract(list(waveform.split(self.window))).input_features

    def _pieces(self, features: Tensor, samples: int) -> list[tuple[Tensor, int]]:
        return [(x, min(self.window, samples - i * self.window)) for i, x in enumerate(features)]

    def _network(self, features: list[Tensor]) -> Tensor:
        return self.model(torch.stack(features).to(self._device, self._dtype)).last_hidden_state


def _check_bands(given: int, taken: int) -> None:
    if given != taken:
        raise ValueError(f"features of {given} bands for a network that takes {taken}")


_FAMILIES: dict[str, type[SpeechEncoder]] = {
    "wavlm": _Wav2Vec2,
    "hubert": _Wav2Vec2,
    "wav2vec2": _Wav2Vec2,
    "wav2vec2-bert": _Wav2Vec2Bert,
    "whisper": _Whisper,
}


def _load(name: str, device: str | torch.device, dtype: torch.dtype) -> SpeechEncoder:
    folder = encoder_folder(name)
    name = str(folder or name)
    if not folder:
        expect_on_hub(name)
    offline = folder is not None or not hub_is_reachable()
    transformers = import_transformers()

    how = {"trust_remote_code": False, "local_files_only": offline}

    @contextmanager
    def loading(part: str) -> Iterator[None]:
        try:
            with quiet():
                yield
        except Exception as error:  # of a dozen kinds, by what is wrong with the folder, the hub or the network
            raise UserError(
                f"speech encoder {name}: cannot load its {part} ({reason(error)}); "
                "expected a folder or a Hugging Face model name with config, weights and preprocessor_config.json"
            ) from error

    with loading("configuration"):
        config = transformers.AutoConfig.from_pretrained(name, **how)
    family = _FAMILIES.get(config.model_type)
    if family is None:
        raise UserError(
            f"speech encoder {name}: type {config.model_type!r} is not supported; "
            f"expected one of {', '.join(_FAMILIES)}"
        )
    if not 0 < config.num_hidden_layers <= _MOST_LAYERS:
        raise UserError(f"speech encoder {name}: {config.num_hidden_layers} layers; expected at most {_MOST_LAYERS}")
    with loading("feature extractor"):
        extractor = transformers.AutoFeatureExtractor.from_pretrained(name, **how)
    if (rate := getattr(extractor, "sampling_rate", None)) != SAMPLE_RATE:
        raise UserError(f"speech encoder {name}: is made for {rate} Hz; expected {SAMPLE_RATE} Hz: choose another")
    for key, value in _LEFT_OUT.items():
        if hasattr(config, key):
            setattr(config, key, value)
    loader = transformers.AutoModel
    if family is _Whisper:
        loader = transformers.models.whisper.modeling_whisper.WhisperEncoder
    how |= {"config": config, "dtype": dtype, "key_mapping": family.key_mapping, "output_loading_info": True}
    with loading("weights"):
        if folder and not any(folder.glob("*.safetensors")):
            for path in folder.glob("pytorch_model*.bin"):
                read_tensors(path)  # in place; transformers doesn't ask what they would take
        model, report = loader.from_pretrained(name, **how)
        # A sum finds them at a tenth of the time that isfinite takes.
        if broken := [key for key, x in model.state_dict().items() if not x.sum(dtype=torch.float32).isfinite()]:
            raise ValueError(f"{len(broken)} of them hold NaN or infinite numbers, such as {broken[0]}")
    if report["missing_keys"]:
        example = min(report["missing_keys"])
        raise UserError(
            f"speech encoder {name}: {len(report['missing_keys'])} weights are missing, such as {example}; "
            "expected a whole checkpoint: fetch it again"
        )
    model = model.to(device)
    try:
        encoder = family(name, model, extractor)
        features = encoder.extract(torch.zeros(SAMPLE_RATE))
        # A window is of half a minute, and as much work.
        frames = None if encoder.window else encoder.encode([features], [SAMPLE_RATE])[0]
    except (AttributeError, TypeError, ValueError, IndexError, RuntimeError, ArithmeticError) as error:
        raise UserError(
            f"speech encoder {name}: its feature extractor, configuration and network do not go together "
            f"({reason(error)}); expected those of one checkpoint: fetch it again"
        ) from error
    if frames is not None and not frames.isfinite().all():
        raise UserError(
            f"speech encoder {name}: what it makes of silence is not finite: its weights are spoilt, or leave the "
            "range of the precision; fetch it again, or try --precision bf16 or fp32"
        )
    return encoder


@functools.cache
def import_transformers() -> ModuleType:
    """transformers, also beside a torchaudio that does not load.

    transformers imports torchaudio wherever it is installed and fails with it, although no encoder here needs it:
    torchaudio's compiled part refuses a torch without CUDA libraries, or with those of another version. Then
    torchaudio is hidden for as long as transformers looks for it.
    """
    import transformers

    try:
        import torchaudio  # noqa: F401
    except (ImportError, OSError, RuntimeError):
        available = transformers.utils.import_utils.is_torchaudio_available
        available.cache_clear()
        sys.modules["torchaudio"] = None  # type: ignore[assignment]  # Python's own way to say "not importable"
        try:
            available()  # remembers the answer
            import transformers.audio_utils
        finally:
            del sys.modules["torchaudio"]
    # WavLM's attention, at its first batch; its users can do nothing about it.
    warnings.filterwarnings("ignore", message="Support for mismatched key_padding_mask and attn_mask")
    return transformers


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from listing the weights that we leave out on purpose, and from its progress bars."""
    logging = import_transformers().utils.logging
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
