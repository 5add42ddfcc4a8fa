"""Every family of encoders, as small random checkpoints on disk, against plain use of the transformers library."""

import json
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from rwkv_speech.errors import UserError
from rwkv_speech.speech.audio import SAMPLE_RATE, load_audio
from rwkv_speech.speech.encoder import SpeechEncoder, import_transformers
from rwkv_speech.speech.hub import hub_is_reachable
from rwkv_speech.speech.identity import encoder_stamp

transformers = import_transformers()

SHARED = Path(__file__).parents[1].parent / "shared"
SAMPLES = [320, 1, 48_000, 7_777, 399, 400, 33_333, 560, 16_000]  # 0.02 s to 3 s, and less than one frame
CONVOLUTIONS = {"conv_dim": (16,) * 7, "num_feat_extract_layers": 7}
TRANSFORMER = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "layerdrop": 0.5,
    "hidden_dropout": 0.5,
    "mask_time_prob": 0.5,
}
BASE = {"feat_extract_norm": "group", "do_stable_layer_norm": False, **CONVOLUTIONS, **TRANSFORMER}
LARGE = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True, **CONVOLUTIONS, **TRANSFORMER}
CONFORMER = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "conv_depthwise_kernel_size": 7,
    "layerdrop": 0.5,
    "mask_time_prob": 0.5,
}
WHISPER = {
    "vocab_size": 60,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "num_mel_bins": 20,
    "max_source_positions": 100,  # windows of 2 s rather than 30
    "dropout": 0.5,
    "encoder_layerdrop": 0.5,
}

# id -> class saved on disk, its configuration, feature extractor
CHECKPOINTS = {
    "wavlm-base": ("WavLMModel", BASE, {"do_normalize": False}),
    "wavlm-large": ("WavLMModel", LARGE, {"do_normalize": True}),
    "hubert-base": ("HubertModel", BASE, {"do_normalize": True}),
    "hubert-large": ("HubertModel", LARGE, {"do_normalize": True}),
    "hubert-batch-norm": ("HubertModel", {**LARGE, "conv_pos_batch_norm": True}, {"do_normalize": True}),
    "wav2vec2-base": ("Wav2Vec2Model", BASE, {"do_normalize": True}),
    "wav2vec2-large": ("Wav2Vec2Model", LARGE, {"do_normalize": True}),
    "wav2vec2-ctc": ("Wav2Vec2ForCTC", {**LARGE, "vocab_size": 20}, {"do_normalize": True}),
    "w2v-bert": ("Wav2Vec2BertModel", CONFORMER, {}),
    "w2v-bert-rotary": ("Wav2Vec2BertModel", {**CONFORMER, "position_embeddings_type": "rotary"}, {}),
    "whisper": ("WhisperForConditionalGeneration", WHISPER, {"feature_size": 20, "chunk_length": 2}),
    "whisper-base-model": ("WhisperModel", WHISPER, {"feature_size": 20, "chunk_length": 2}),
}


def write_checkpoint(folder: Path, kind: str, **changes: object) -> Path:
    """A random checkpoint whose weights are large enough for every part to matter."""
    name, settings, features = CHECKPOINTS[kind]
    model_class = getattr(transformers, name)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**{**settings, **changes})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "parametrizations" not in name and "embed_positions" not in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    if "bert" in kind and kind.startswith("w2v"):
        extractor = transformers.SeamlessM4TFeatureExtractor(**features)
    elif kind.startswith("whisper"):
        extractor = transformers.WhisperFeatureExtractor(**features)
    else:  # declares no attention mask, as wavlm-large's does not
        extractor = transformers.Wav2Vec2FeatureExtractor(return_attention_mask=False, **features)
    extractor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=CHECKPOINTS)
def checkpoint(request, tmp_path_factory) -> tuple[str, Path]:
    return request.param, write_checkpoint(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def encoder(checkpoint) -> SpeechEncoder:
    return SpeechEncoder.from_pretrained(str(checkpoint[1]))


def speech(samples: int, seed: int = 0) -> torch.Tensor:
    """Noise with a swelling level and an offset, so that a normalisation over the wrong samples shows."""
    generator = torch.Generator().manual_seed(seed + samples)
    level = torch.linspace(0.02, 0.3, samples)
    return torch.randn(samples, generator=generator) * level + 0.05


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


def reference_frames(folder: Path, waveform: torch.Tensor) -> torch.Tensor:
    """Plain use of the transformers library on one utterance of ordinary length."""
    extractor = transformers.AutoFeatureExtractor.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    features = extractor(waveform.numpy(), sampling_rate=SAMPLE_RATE, return_tensors="pt")
    with torch.no_grad():
        if isinstance(extractor, transformers.WhisperFeatureExtractor):
            return model.encoder(features.input_features).last_hidden_state[0, : -(-len(waveform) // 320)]
        frames = model(**features).last_hidden_state[0]
    return frames[features.attention_mask[0].bool()] if "input_features" in features else frames


@pytest.mark.parametrize("samples", [5_000, 16_000, 16_200, 31_999])
def test_frames_equal_plain_transformers(checkpoint, encoder, samples):
    waveform = speech(samples)
    frames, lengths = encoder([waveform])
    assert frames.dtype is torch.float32
    assert lengths.tolist() == [frames.shape[1]]
    assert frames.shape[2] == encoder.width == 32
    expected = reference_frames(checkpoint[1], waveform)
    assert expected.std() > 0.1
    close(frames[0], expected)


def test_batch_gives_each_sample_the_frames_it_gets_alone(encoder):
    waveforms = [speech(n) for n in SAMPLES]
    frames, lengths = encoder(waveforms)
    assert frames.shape[:2] == (len(SAMPLES), max(lengths))
    for b, waveform in enumerate(waveforms):
        alone, length = encoder([waveform])
        assert lengths[b] == length[0] == encoder.frame_count(len(waveform))
        close(frames[b, : lengths[b]], alone[0])
        assert frames[b, lengths[b] :].count_nonzero() == 0
    assert frames.isfinite().all()


def test_calls_of_bounded_size_agree_with_one_call(encoder, monkeypatch):
    waveforms = [speech(n) for n in SAMPLES]
    frames, lengths = encoder(waveforms)
    sizes = []
    network = encoder._network
    monkeypatch.setattr(encoder, "_network", lambda batch: sizes.append(len(batch)) or network(batch))
    monkeypatch.setattr(encoder, "call_samples", min(encoder.call_samples, 70_000))
    split, split_lengths = encoder(waveforms)
    assert len(sizes) > 1
    assert lengths.tolist() == split_lengths.tolist()
    close(split, frames)


def test_frame_count_is_exact_at_the_edges(encoder):
    edges = [1, 2, 100, 319, 320, 321, 399, 400, 401, 559, 560, 561, 639, 640, 641, 719, 720, 721, 879, 880, 881]
    edges += [1039, 1040, 1041, 4_321, 15_999, 16_000, 16_001, 31_999, 32_000, 32_001, 32_320, 32_321, 64_000, 70_000]
    for samples in edges:
        frames, lengths = encoder([speech(samples)])
        assert frames.shape[1] == lengths[0] == encoder.frame_count(samples) >= 1, samples
    assert encoder.frame_rate == 50
    assert abs(encoder.frame_count(60 * SAMPLE_RATE) / 60 - encoder.frame_rate) < 0.1


def test_frozen_whatever_train_and_autocast_say(encoder):
    waveforms = [speech(9_000), speech(20_000)]
    before, _ = encoder(waveforms)
    holder = torch.nn.ModuleList([encoder]).train()
    assert not any(module.training for module in encoder.modules())
    with torch.autocast("cpu", torch.bfloat16):
        after, _ = holder[0](waveforms)
    assert torch.equal(before, after)
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert not after.requires_grad
    assert not after.is_inference()  # such tensors cannot take part in autograd
    (after @ torch.nn.Parameter(torch.ones(encoder.width))).sum().backward()


def test_silence_and_bf16(checkpoint):
    encoder = SpeechEncoder.from_pretrained(str(checkpoint[1]), dtype=torch.bfloat16)
    exact = SpeechEncoder.from_pretrained(str(checkpoint[1]))
    waveforms = [speech(9_000), torch.zeros(9_000), torch.zeros(1)]
    frames, lengths = encoder(waveforms)
    assert frames.dtype is torch.bfloat16
    assert frames.isfinite().all()
    expected, expected_lengths = exact(waveforms)
    assert lengths.tolist() == expected_lengths.tolist()
    # bf16 has 8 bits, and two layers of random weights pass its rounding on.
    assert (frames[0] - expected[0]).std() < 0.1 * expected[0].std()


def test_short_audio_is_its_own_zero_padding(tmp_path):
    """WavLM without normalisation: 100 samples give what the same samples and 300 zeros give."""
    encoder = SpeechEncoder.from_pretrained(str(write_checkpoint(tmp_path, "wavlm-base")))
    short = speech(100)
    close(encoder([short])[0], encoder([torch.cat([short, torch.zeros(300)])])[0])


def test_whisper_hears_long_audio_in_consecutive_windows(tmp_path):
    folder = write_checkpoint(tmp_path, "whisper")
    encoder = SpeechEncoder.from_pretrained(str(folder))
    waveform = speech(2 * 32_000 + 12_345)
    windows = [waveform[:32_000], waveform[32_000:64_000], waveform[64_000:]]
    expected = torch.cat([reference_frames(folder, window) for window in windows])
    frames, lengths = encoder([speech(100), waveform])
    assert lengths.tolist() == [1, 100 + 100 + 39]  # 12,345 / 320 = 38.6
    close(frames[1], expected)


def test_whisper_leaves_the_decoder_on_disk(tmp_path):
    encoder = SpeechEncoder.from_pretrained(str(write_checkpoint(tmp_path, "whisper")))
    assert not any("decoder" in name for name in encoder.state_dict())


def test_downsampling_of_the_checkpoint_is_left_out(tmp_path):
    folder = write_checkpoint(tmp_path, "w2v-bert", add_adapter=True, use_intermediate_ffn_before_adapter=True)
    encoder = SpeechEncoder.from_pretrained(str(folder))
    frames, _ = encoder([speech(16_000)])
    model = transformers.AutoModel.from_pretrained(folder).eval()
    heard = []
    model.encoder.register_forward_hook(lambda *call: heard.append(call[2].last_hidden_state))
    extractor = transformers.AutoFeatureExtractor.from_pretrained(folder)
    with torch.no_grad():
        model(**extractor(speech(16_000).numpy(), sampling_rate=SAMPLE_RATE, return_tensors="pt"))
    close(frames, heard[0][:, : frames.shape[1]])


def damage(folder: Path, how: str) -> Path | str:
    config = folder / "config.json"
    match how:
        case "absent":
            return folder / "nowhere"
        case "unknown-name":
            return "nobody/no-such-model"
        case "no-config":
            config.unlink()
        case "text-model":
            config.write_text(json.dumps({"model_type": "bert"}))
        case "no-extractor":
            (folder / "preprocessor_config.json").unlink()
        case "other-rate":
            path = folder / "preprocessor_config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | {"sampling_rate": 8_000}))
        case "no-weights":
            (folder / "model.safetensors").unlink()
        case "cut-weights":
            path = folder / "model.safetensors"
            path.write_bytes(path.read_bytes()[:10_000])
        case "a-million-layers":
            config.write_text(json.dumps(json.loads(config.read_text()) | {"num_hidden_layers": 10**6}))
        case "more-layers":
            config.write_text(json.dumps(json.loads(config.read_text()) | {"num_hidden_layers": 3}))
        case "wider":
            config.write_text(json.dumps(json.loads(config.read_text()) | {"intermediate_size": 64}))
    return folder


@pytest.fixture
def no_network(monkeypatch):
    """Nothing listens there."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    hub_is_reachable.cache_clear()
    yield
    hub_is_reachable.cache_clear()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("absent", "no such folder"),
        ("unknown-name", "no such folder here, nor a copy .* the hub cannot be reached"),
        ("no-config", "cannot load its configuration"),
        ("text-model", "type 'bert' is not supported; expected one of wavlm, hubert, wav2vec2, wav2vec2-bert, whisper"),
        ("no-extractor", "cannot load its feature extractor .*preprocessor_config.json"),
        ("other-rate", "is made for 8000 Hz"),
        ("no-weights", "cannot load its weights"),
        ("cut-weights", "cannot load its weights"),
        ("more-layers", "weights are missing, such as encoder.layers.2"),
        ("wider", "cannot load its weights"),
    ],
)
def test_what_cannot_be_loaded(tmp_path, no_network, how, message):
    source = damage(write_checkpoint(tmp_path, "wavlm-base"), how)
    with pytest.raises(UserError, match=message) as caught:
        SpeechEncoder.from_pretrained(str(source))
    assert str(source) in str(caught.value)
    assert "\n" not in str(caught.value)


class Trap:
    def __reduce__(self):
        return Path.touch, (Trap.target,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("pickled-code", "cannot load its weights"),
        ("compressed", r"cannot load its weights .is compressed"),
        ("stride-0", r"cannot load its weights .holds .* by repetition"),
        ("nan", "1 of them hold NaN or infinite numbers, such as feature_projection.projection.bias"),
        ("cut-to-whole-numbers", "what it makes of silence is not finite"),
    ],
)
def test_weights_that_are_none(tmp_path, monkeypatch, change, message):
    monkeypatch.setattr(Trap, "target", tmp_path / "trap", raising=False)
    folder = write_checkpoint(tmp_path / "model", "wavlm-base")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if change == "nan":
        tensors["feature_projection.projection.bias"][3] = torch.nan
    if change == "cut-to-whole-numbers":  # most are 0, and weight normalisation divides by their norms
        tensors = {name: x.trunc() for name, x in tensors.items()}
    if change == "stride-0":
        tensors["feature_projection.projection.bias"] = torch.zeros(1).expand(10**10)
    path = folder / "pytorch_model.bin"
    torch.save(tensors | ({"more": Trap()} if change == "pickled-code" else {}), path)
    if change == "compressed":
        with zipfile.ZipFile(path) as old:
            parts = {part: old.read(part) for part in old.namelist()}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
            for name, content in parts.items():
                new.writestr(name, content)
    with pytest.raises(UserError, match=message) as caught:
        SpeechEncoder.from_pretrained(str(folder))
    assert "weights_only" not in str(caught.value)
    assert not (tmp_path / "trap").exists()


@pytest.mark.parametrize(
    ("kind", "extractor"),
    [("whisper", {"feature_size": 80}), ("w2v-bert", {"feature_size": 20}), ("w2v-bert", {"stride": 0})],
    ids=["whisper-mels", "bert-mels", "bert-stride"],
)
def test_a_feature_extractor_of_another_checkpoint(tmp_path, kind, extractor):
    folder = write_checkpoint(tmp_path, kind)
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | extractor))
    with pytest.raises(UserError, match="feature extractor, configuration and network do not go together"):
        SpeechEncoder.from_pretrained(str(folder))


def test_more_layers_than_there_can_be(tmp_path):
    folder = damage(write_checkpoint(tmp_path, "wavlm-base"), "a-million-layers")
    with pytest.raises(UserError, match="1000000 layers; expected at most 1000"):
        SpeechEncoder.from_pretrained(str(folder))


def test_without_a_network_the_hub_is_not_asked_again_and_again(no_network):
    """The hub's own library tries for 23 s, for each file."""
    start = time.monotonic()
    assert encoder_stamp("nobody/nothing", torch.float32) is None
    with pytest.raises(UserError, match=r"nobody/nothing: .* the hub cannot be reached"):
        SpeechEncoder.from_pretrained("nobody/nothing")
    assert time.monotonic() - start < 10


def test_code_of_a_checkpoint_is_never_run(tmp_path):
    folder = write_checkpoint(tmp_path / "model", "wavlm-base")
    trap = tmp_path / "trap"
    (folder / "evil.py").write_text(f"open({str(trap)!r}, 'w')\nclass Config: pass\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="cannot load its configuration"):
        SpeechEncoder.from_pretrained(str(folder))
    assert not trap.exists()


@pytest.mark.skipif(not (SHARED / "models/whisper-tiny.en").exists(), reason="../shared/models is absent")
def test_real_whisper_on_real_speech():
    folder = SHARED / "models/whisper-tiny.en"
    encoder = SpeechEncoder.from_pretrained(str(folder))
    waveform = load_audio(SHARED / "speech/jfk.flac")  # 11 s, two channels, 44.1 kHz
    frames, lengths = encoder([waveform, waveform[:20_000]])
    assert frames.shape == (2, 550, 384)
    assert lengths.tolist() == [550, 63]
    assert np.isclose(sum(p.numel() for p in encoder.parameters()), 8.2e6, rtol=0.01)
    close(frames[0], reference_frames(folder, waveform))
