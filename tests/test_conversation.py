"""Conversations: against one pass over all that was said; on disk, in training and evaluation, in a terminal."""

import json
import os
import sys
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor

from rwkv_speech import SpeechRWKV, session
from rwkv_speech.answering import answer_rounds
from rwkv_speech.data.durations import read_durations
from rwkv_speech.data.manifest import read_manifest
from rwkv_speech.data.sample import Message, Sample
from rwkv_speech.errors import UserError
from rwkv_speech.files import printable
from rwkv_speech.lm.initialise import official_sizes, random_weights
from rwkv_speech.lm.tokenizer import Tokenizer
from rwkv_speech.options import DecodingOptions
from rwkv_speech.scoring import ConversationScores, EvalRecord, read_records
from rwkv_speech.session import StrippedStream
from rwkv_speech.speech import microphone
from rwkv_speech.speech.audio import AudioError
from tests.tiny import at_door, do, losses, missions

MOST = 6  # tokens of an answer


@pytest.fixture(scope="module", params=[6, 7], ids=["rwkv6", "rwkv7"])
def model(request, world, tmp_path_factory) -> SpeechRWKV:
    """With a state and an adapter that matter, and answers of which some end by themselves."""
    path = world.model
    if request.param == 7:
        path = tmp_path_factory.mktemp("model") / "model.pth"
        sizes = official_sizes(generation=7, n_layer=2, n_embd=64, vocab_size=257, head_size=32)
        torch.save(random_weights(sizes, seed=1), path)
    torch.manual_seed(3)
    model = SpeechRWKV.from_pretrained(path, encoder=world.encoder, adapter_hidden=16)
    model.language_model.head.weight[0] *= 2
    for state in model.language_model.time_states:
        torch.nn.init.normal_(state)
    return model


def waves(*lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [0.1 * torch.randn(n, generator=generator) for n in lengths]


@torch.no_grad()
def read(model: SpeechRWKV, said: list[Tensor | str | list[int]]) -> Tensor:
    """What is said, texts and tokens and waveforms, as the vectors (1, T, C) that the language model reads."""
    parts = []
    for part in said:
        if isinstance(part, Tensor):
            embeds, valid = model.adapter(*model.speech_encoder([part]))
            parts.append(embeds[0, : valid[0]])
        else:
            ids = [byte + 1 for byte in part.encode()] if isinstance(part, str) else part
            parts.append(model.language_model.emb.weight[ids])
    return torch.cat(parts)[None]


@torch.no_grad()
def greedy(model: SpeechRWKV, said: list[Tensor | str | list[int]]) -> list[int]:
    """The answer to all that was said, by a pass over all of it for each token."""
    answer: list[int] = []
    while len(answer) < MOST:
        hidden, _ = model.language_model(read(model, [*said, answer]))
        token = int(model.language_model.logits(hidden[:, -1]).argmax())
        if token == 0:
            break
        answer.append(token)
    return answer


def spelt(model: SpeechRWKV, answer: list[int]) -> str:
    return bytes(token - 1 for token in answer).decode(errors="replace").strip()


def state_of(chat) -> dict[str, Tensor]:
    return chat._now.state.state_dict()


def same(a, b) -> bool:
    a, b = state_of(a), state_of(b)
    return all(torch.equal(a[name], b[name]) for name in a)


# --- one state -------------------------------------------------------------------------------------------------------


def test_a_talk_is_one_pass_over_all_that_was_said_and_answered(model):
    """Texts and state of five rounds; in the third, what was listened to is asked about later."""
    a, b, c, d = waves(9_000, 3_000, 5_000, 8_000)
    talk: list[list[Tensor | str]] = [[a], ["two words"], [b, c, "about both"], ["x", d], ["and?"]]
    chat, said, lengths = model.conversation(), [], set()
    for number, turn in enumerate(talk):
        said += [[0]] * (number > 0) + turn + [[36]]
        answer = greedy(model, said)
        said.append(answer)
        lengths.add(len(answer) < MOST)
        if number == 2:
            chat.listen(b)
            chat.listen(c)
            pieces = list(chat.reply("about both", max_new_tokens=MOST))
        else:
            pieces = list(chat.reply(*turn, max_new_tokens=MOST))
        assert "".join(pieces) == spelt(model, answer)
        with torch.no_grad():
            _, state = model.language_model(read(model, said))
        assert chat.rounds == number + 1
        for name, x in state.state_dict().items():
            torch.testing.assert_close(state_of(chat)[name], x, rtol=1e-4, atol=1e-5, msg=name)
    assert lengths == {True, False}, "void: answers must end both ways"


def test_undo_and_fork_are_exact(model):
    a, b = waves(9_000, 3_000)
    chat = model.conversation()
    with pytest.raises(UserError, match="no round to take back"):
        chat.undo()
    with pytest.raises(UserError, match="nothing was said"):
        chat.reply()
    first = "".join(chat.reply(a, max_new_tokens=MOST))
    before = chat.fork()
    chat.listen(b)
    second = "".join(chat.reply("why", max_new_tokens=MOST))
    after = chat.fork()
    assert not same(chat, before)
    chat.undo()
    assert same(chat, before)
    assert chat.rounds == 1
    with pytest.raises(UserError, match="no round to take back"):
        chat.undo()
    for other in (chat, before):  # the same again, in either of the two
        other.listen(b)
        assert "".join(other.reply("why", max_new_tokens=MOST)) == second
        assert same(other, after)
    chat.listen(a)
    chat.undo()  # what was listened to, and not the round before
    assert chat.rounds == 2
    begun = model.conversation()
    assert "".join(begun.reply(a, max_new_tokens=MOST)) == first


def test_an_answer_that_is_not_taken_to_its_end_was_not_asked_for(model):
    (a,) = waves(9_000)
    chat = model.conversation()
    "".join(chat.reply(a, max_new_tokens=MOST))
    before = chat.fork()
    pieces = chat.reply("more", max_new_tokens=MOST)
    next(pieces, None)
    pieces.close()
    assert same(chat, before)
    late = chat.reply("more", max_new_tokens=MOST)
    "".join(chat.reply("meanwhile", max_new_tokens=MOST))
    with pytest.raises(RuntimeError, match="went on elsewhere"):
        list(late)


def test_beams_and_samples_make_the_state_of_their_answer(model):
    """Whatever the search: the next round goes on from the tokens of the answer that was given."""
    (a,) = waves(9_000)
    for search in ({"beam": 3}, {"temperature": 1.0, "sampling_seed": 4}):
        chat = model.conversation()
        batch = model.prepare([Sample("0", (Message("user", (a,)),))])
        (result,) = model.decode(batch, DecodingOptions(max_new_tokens=MOST, **search))
        assert "".join(chat.reply(a, max_new_tokens=MOST, **search)) == model.text(result)
        with torch.no_grad():
            _, state = model.language_model(read(model, [a, [36], result.tokens]))
        for name, x in state.state_dict().items():
            torch.testing.assert_close(state_of(chat)[name], x, rtol=1e-4, atol=1e-5)


def test_pieces_are_whole_characters_and_the_answer_without_space_around_it():
    tokenizer = Tokenizer(257)
    for text in (" \n Grüße  an 你好 \n\t", "日本", "   ", "", "a\xa0"):
        stream = StrippedStream(tokenizer.stream())
        pieces = [*map(stream.feed, tokenizer.encode(text)), stream.flush()]
        assert "".join(pieces) == text.strip()
        assert not any("\ufffd" in piece for piece in pieces)
    stream = StrippedStream(tokenizer.stream())
    assert [stream.feed(byte + 1) for byte in "é".encode()[:1]] + [stream.flush()] == ["", "\ufffd"]


def test_round_20_reads_what_round_2_reads(model):
    chat, positions = model.conversation(), []
    hook = model.language_model.register_forward_pre_hook(lambda _, inputs: positions.append(inputs[0].shape[1]))
    read_by_round = []
    for _ in range(20):
        positions.clear()
        "".join(chat.reply("and now?", max_new_tokens=4))
        read_by_round.append(positions.copy())
    hook.remove()
    assert all(first == len("\0and now?#") and {*steps} <= {1} for first, *steps in read_by_round[1:])


def test_an_answer_may_get_as_long_as_what_was_listened_to_allows(world, tmp_path, monkeypatch):
    """Of transcripts 50 tokens a second, 100 at least; also where a file lies between listening and answering."""
    limits = []
    plain = session.generate
    monkeypatch.setattr(
        *(session, "generate"),
        lambda *given, max_new_tokens, **how: plain(*given, max_new_tokens=limits.append(max_new_tokens) or [1], **how),
    )
    chat = world.speech_rwkv(adapter_hidden=16).conversation()
    chat.listen(torch.zeros(24_000))
    chat.listen(torch.zeros(24_000))
    chat.save(tmp_path / "x.safetensors")
    for talk in (chat, chat.load(tmp_path / "x.safetensors")):
        list(talk.reply())
        list(talk.reply("typed"))
    assert limits == [[150], [100]] * 2


def test_a_talk_begins_with_the_state_of_its_mission(world):
    model = world.speech_rwkv(mission=["transcribe", "converse"], adapter_hidden=16, share_adapter=False)
    with torch.no_grad():
        for state in model.language_model.time_states:
            state.normal_()
    for place, name in enumerate(model.tasks):
        chat = model.conversation(mission=name)
        for layer, state in enumerate(model.language_model.time_states):
            assert torch.equal(state_of(chat)[f"{layer}.wkv"][0], state[place])
    assert list(chat.reply("typed", max_new_tokens=2))


# --- on disk ---------------------------------------------------------------------------------------------------------


def test_a_round_from_a_file_is_that_of_a_talk_without_interruption(model, tmp_path):
    a, b = waves(9_000, 3_000)
    chat, sizes = model.conversation(), set()
    for number in range(12):
        path = tmp_path / f"{number}.safetensors"
        if number == 5:
            chat.listen(a)
        chat.save(path)
        sizes.add(path.stat().st_size)
        loaded = model.conversation(path)
        assert loaded.rounds == number
        said = [b, "and" * number] if number % 2 else ["so", a]
        assert list(loaded.reply(*said, max_new_tokens=4)) == list(chat.reply(*said, max_new_tokens=4))
        assert same(loaded, chat)
    assert len(sizes) == 1
    assert not list(tmp_path.glob(".*")), "nothing of an unfinished file"


def test_a_file_that_does_not_fit_is_one_line(model, world, tmp_path):
    path = tmp_path / "talk.safetensors"
    model.conversation().save(path)
    torch.manual_seed(4)
    other = world.speech_rwkv(adapter_hidden=16)
    with pytest.raises(UserError, match=r"talk\.safetensors: of another model: .* was .*, is ") as error:
        other.conversation(path)
    assert "\n" not in str(error.value)
    other.conversation().save(tmp_path / "other.safetensors")
    with torch.no_grad():
        other.adapter.layers[0].weight += 1
    with pytest.raises(UserError, match="of another model: mission file was"):
        other.conversation(tmp_path / "other.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    for name in ("talk.pth", "none.safetensors", "folder.safetensors", "cut.safetensors", "plain.safetensors"):
        broken = tmp_path / name
        if name == "cut.safetensors":
            broken.write_bytes(path.read_bytes()[:-100])
        elif name == "plain.safetensors":
            from safetensors.torch import save_file

            save_file({"x": torch.zeros(1)}, broken)
        with pytest.raises(UserError, match=f"{broken.name}.*(expected|damaged)"):
            model.conversation(broken)
    with pytest.raises(UserError, match="has not learnt the mission 'sing'"):
        model.conversation(mission="sing")
    with pytest.raises(UserError, match="label chooses among labels"):
        world.speech_rwkv(mission="label").conversation()
    with pytest.raises(UserError, match=r"audio 0: lasts 2 s, more than the 1 s that are answered in one go"):
        model.conversation(max_audio_s=1.0).listen(torch.zeros(32_000))


# --- several rounds in training and in evaluation --------------------------------------------------------------------


def talks(*rounds: int) -> list[Sample]:
    """Samples of so many rounds, of recordings, typed texts and both."""
    sounds = iter(waves(*[2_500 + 700 * i for i in range(sum(rounds))]))
    found = []
    for number, count in enumerate(rounds):
        messages = []
        for k in range(count):
            sound = next(sounds)
            said = [(sound,), ("typed",), ("about it", sound)][(number + k) % 3]
            messages += [Message("user", said), Message("assistant", ("yes " * k + "no",))]
        found.append(Sample(f"t{number}", tuple(messages)))
    return found


@pytest.mark.parametrize("longest", [1, 7, 16, 30])
@pytest.mark.parametrize("again", [False, True], ids=["", "grad_cp"])
def test_loss_and_gradient_in_pieces_are_those_of_one_pass(model, longest, again):
    batch = model.prepare(talks(3, 1, 2))
    assert batch.ids.shape[1] > 30, "void: it must be cut"
    learning = [x.parameter for x in model.trained_tensors().values()]
    one = model.loss_sum(batch)
    expected = torch.autograd.grad(one, learning)
    model.language_model.checkpointing = again
    try:
        loss = model.loss_sum(batch, longest=longest)
        found = torch.autograd.grad(loss, learning)
    finally:
        model.language_model.checkpointing = False
    torch.testing.assert_close(loss, one, rtol=1e-5, atol=0)
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4 * float(want.abs().max()))


@pytest.mark.parametrize("references", [False, True], ids=["own answers", "references"])
def test_rounds_are_answered_after_own_answers_or_after_the_references(model, references):
    samples = talks(3, 1, 2)
    options = DecodingOptions(max_new_tokens=MOST)
    found = answer_rounds(model, model.prepare(samples), options, references=references)
    assert [len(rounds) for rounds in found] == [3, 1, 2]
    for sample, rounds in zip(samples, found, strict=True):
        said: list = []
        for asked, reference, result in zip(sample.messages[::2], sample.messages[1::2], rounds, strict=True):
            said += [[0]] * bool(said) + [*asked.parts, [36]]
            answer = greedy(model, said)
            assert result.tokens == answer
            said.append(reference.parts[0] if references else answer)


def test_rounds_beside_samples_of_other_missions(world):
    """As validation has them in one batch: each as by itself."""
    torch.manual_seed(3)
    model = world.speech_rwkv(mission=["converse", "label", "transcribe"], adapter_hidden=16)
    model.task("label").labels = ["cat", "dog"]
    missions = ["converse", "label", "transcribe", "converse"]
    samples = [replace(x, mission=name) for x, name in zip(talks(3, 1, 1, 2), missions, strict=True)]
    options = DecodingOptions(max_new_tokens=MOST)
    together = answer_rounds(model, model.prepare(samples), options)
    alone = [answer_rounds(model, model.prepare([sample]), options)[0] for sample in samples]
    assert [[x.tokens for x in rounds] for rounds in together] == [[x.tokens for x in rounds] for rounds in alone]
    assert [len(rounds) for rounds in together] == [3, 1, 1, 2]
    assert spelt(model, together[1][0].tokens) in ("cat", "dog")


# --- rows ------------------------------------------------------------------------------------------------------------


def line(*messages: dict, **more) -> str:
    return json.dumps({"messages": list(messages), "mission": "converse"} | more) + "\n"


def user(**said) -> dict:
    return {"role": "user"} | said


def answer(text: str = "ok") -> dict:
    return {"role": "assistant", "text": text}


def test_a_manifest_of_conversations(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(16_000), 16_000)
    manifest = tmp_path / "talks.jsonl"
    part = user(audio="a.wav", offset=0, duration=0.25, text="before it")
    manifest.write_text(
        line(user(audio="a.wav"), answer(), part, answer("you said"), id="x", speaker="ann")
        + line(user(text="typed"), answer())
    )
    first, second = read_manifest(manifest)
    assert (first.id, first.mission, first.speaker, first.text) == ("x", "converse", "ann", "you said")
    assert (second.id, second.recordings) == ("talks.jsonl, line 2", [])
    assert [m.role for m in first.messages] == ["user", "assistant"] * 2
    assert [str(x) for x in first.recordings] == [str(tmp_path / "a.wav")] * 2, "no other row cuts the file"
    assert first.messages[2].parts[0] == "before it"
    assert read_durations([first, second], tmp_path / "d.json").tolist() == [1.25, 0.0]

    cut = user(audio="a.wav", offset=0.25, duration=0.5)
    manifest.write_text(line(user(audio="a.wav"), answer(), part, answer()) + line(cut, answer()))
    first, second = read_manifest(manifest)
    assert [len(x.waveform()) for x in (*first.recordings, *second.recordings)] == [16_000, 4_000, 8_000]


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([], r"'messages' is \[\], not a list of messages"),
        ("hello", "'messages' is 'hello', not a list"),
        ([answer()], "message 1: 'role' is 'assistant', not 'user'"),
        ([user(text="a"), user(text="b")], "message 2: 'role' is 'user', not 'assistant'"),
        ([user(text="a")], "the last of 'messages' is the user's"),
        ([user(), answer()], "message 1: no 'text' and no audio"),
        ([user(text="  "), answer()], "message 1: no 'text' and no audio"),
        ([user(text="a"), answer("")], "message 2: no 'text'"),
        ([user(text="a"), answer() | {"audio": "a.wav"}], "message 2: 'audio' of the assistant"),
        ([user(text=3), answer()], "message 1: 'text' is 3, not a string"),
        ([user(audio="a.wav", offset=-1), answer()], "message 1: 'offset' is -1, not a number of seconds"),
        (["a", answer()], "message 1: 'a', not an object"),
    ],
)
def test_what_is_no_conversation_is_named(messages, problem, tmp_path):
    manifest = tmp_path / "talks.jsonl"
    manifest.write_text(line(user(text="a"), answer()) + json.dumps({"messages": messages}) + "\n")
    with pytest.raises(UserError, match=f"1 malformed line \\(line 2: {problem}"):
        read_manifest(manifest)


# --- scores ----------------------------------------------------------------------------------------------------------


def test_scores_by_round():
    """Two conversations: of three rounds, of which own answers get two right, and of one, which is right."""

    def rounds(*triples):
        names = ("reference", "hypothesis", "with_references")
        return {"rounds": [{"round": k} | dict(zip(names, x, strict=True)) for k, x in enumerate(triples, start=1)]}

    records = [
        EvalRecord(id="a", reference="", hypothesis="", seconds=1.0, details=details)
        for details in (rounds(("5", "5", "5"), ("9", "8", "9"), ("a cat", "the cat", "dog")),)
    ] + [EvalRecord(id="b", reference="", hypothesis="", seconds=1.0, details=rounds(("7", "7.", "7")))]
    scores = ConversationScores(records)
    assert (scores.leading.kind.name, scores.leading.value) == ("exact_match", 3 / 4)
    assert scores.leading.interval == (pytest.approx(2 / 3), 1.0), "of the conversations: either one alone, or both"
    table = [(x["<Round"], x["Conversations"], x["*Exact match %"], x["With references %"]) for x in scores.rows()]
    assert table == [
        ("all", "2", "75.00 (66.67–100.00)", "75.00"),
        ("1", "2", "100.00 (100.00–100.00)", "100.00"),
        ("2", "1", "0.00 (0.00–0.00)", "100.00"),
        ("3", "1", "100.00 (100.00–100.00)", "0.00"),
    ]
    second = scores.summary()["rounds"][1]
    assert (second["round"], second["conversations"], second["metrics"][0]["value"]) == (2, 1, 0.0)
    assert second["with_references"][0]["value"] == 1.0
    assert "a, round 2" in scores.sections("x")


# --- from the flags on -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory) -> Path:
    """A project in which conversations were learnt and evaluated; talks.jsonl names their recordings."""
    project = tmp_path_factory.mktemp("talks")
    lines = []
    for i in range(4):
        (a, said), (b, _) = world.utterances[2 * i : 2 * i + 2]
        messages = [user(audio=os.path.relpath(a, project)), answer(said), user(text="and before?"), answer(said)]
        if i % 2:
            messages += [user(audio=os.path.relpath(b, project), text="this"), answer("new")]
        lines.append(line(*messages, id=f"t{i}"))
    lines += [line(user(text="typed"), answer("read"), id=id) for id in ("t4", "t5")]  # a batch without any audio
    (project / "talks.jsonl").write_text("".join(lines))
    flags = [f"--data={project / 'talks.jsonl'}", "--max_new_tokens=4"]
    train = [*flags, "--epoch_count=1", "--micro_bsz=2", "--ctx_len=20", f"--valid_split={project / 'talks.jsonl'}"]
    assert do("train", world, project, *train) == 0
    assert do("eval", world, project, *flags) == 0
    return project


def test_conversations_are_learnt_and_scored_by_round(trained, world, capsys):
    ((tensors, info),) = missions(trained).values()
    assert (info["mission"], info["step"]) == ("converse", 3)
    assert 0 <= info["exact_match"] <= 1
    assert all(bool(x.any()) for name, x in tensors.items() if "time_state" in name), "the first state has learnt"
    found = read_records(trained / "eval/all.jsonl")
    assert [[x["round"] for x in record.details["rounds"]] for record in found] == [
        *([[1, 2], [1, 2, 3]] * 2),
        *([[1]] * 2),
    ]
    model = world.speech_rwkv(adapter=next(trained.glob("*.pth")))
    rows = read_manifest(trained / "talks.jsonl")
    lengths = model.prepare([*map(model.sample, rows)]).lengths
    assert lengths.min() < 20 < lengths.max(), "void: some must have been longer than ctx_len"
    row, search = rows[0], {"max_new_tokens": 4}
    chat = model.conversation()
    for asked, x in zip(row.messages[::2], found[0].details["rounds"], strict=True):
        said = [part if isinstance(part, str) else part.waveform() for part in asked.parts]
        assert "".join(chat.reply(*said, **search)) == x["hypothesis"]
    assert found[0].details["rounds"][0]["with_references"] == found[0].details["rounds"][0]["hypothesis"]
    summary = json.loads((trained / "eval/summary.json").read_text())["splits"]["all"]
    assert [(x["round"], x["conversations"]) for x in summary["rounds"]] == [(1, 6), (2, 4), (3, 2)]
    assert "With references" in (trained / "eval/report.html").read_text()
    assert do("score", world, trained, f"--records={trained / 'eval/all.jsonl'}", f"--output_dir={trained / 's'}") == 0
    assert json.loads((trained / "s/summary.json").read_text())["splits"]["all"]["rounds"] == summary["rounds"]
    assert "Round" in capsys.readouterr().out


def test_conversations_are_learnt_from_cached_frames(trained, world, tmp_path):
    flags = [f"--data={trained / 'talks.jsonl'}", "--epoch_count=1", "--micro_bsz=2", "--ctx_len=20"]
    assert do("train", world, tmp_path, *flags, f"--cache_features={tmp_path / 'frames'}") == 0
    assert losses(tmp_path) == pytest.approx(losses(trained), rel=1e-3)


def test_transcripts_are_aligned_beside_conversations(trained, world, tmp_path):
    """By CTC, which has nothing to say to these; where there is nothing else, that is an error."""
    spoken = tmp_path / "spoken.jsonl"
    lines = [{"audio": str(path), "text": text, "mission": "transcribe"} for path, text in world.utterances[:4]]
    spoken.write_text("".join(json.dumps(x) + "\n" for x in lines))
    flags = ["--epoch_count=1", "--micro_bsz=5", "--ctc_align=0.5", "--downsample_k=2"]
    assert do("train", world, tmp_path, f"--train_split={trained / 'talks.jsonl'}+{spoken}", *flags) == 0
    assert "nan" not in (tmp_path / "metrics.csv").read_text()
    with pytest.raises(UserError, match="a sample here has none or several"):
        do("train", world, tmp_path / "x", f"--data={trained / 'talks.jsonl'}", *flags)


def test_a_bad_recording_in_a_conversation_is_named(trained, world, tmp_path):
    manifest = tmp_path / "talks.jsonl"
    manifest.write_text(line(user(text="a"), answer(), user(audio="gone.wav"), answer(), id="x"))
    with pytest.raises(UserError, match=r"bad sample x: a conversation: .*gone\.wav"):
        do("eval", world, trained, f"--data={manifest}", f"--proj_dir={trained}")
    manifest.write_text(line(user(text="a"), answer(), id="x", mission="transcribe"))
    with pytest.raises(UserError, match=r"bad sample x: .*a row of the mission converse"):
        do("train", world, tmp_path, f"--data={manifest}", "--mission=transcribe")


def talk(world, project, monkeypatch, capsys, text: str, *flags: str):
    """What the program says to lines that come through a pipe."""
    reading, writing = os.pipe()
    os.write(writing, text.encode())
    os.close(writing)
    with open(reading) as pipe:
        monkeypatch.setattr(sys, "stdin", pipe)
        settings = [*world.flags[:2], *world.flags[3:], f"--proj_dir={project}", "--max_new_tokens=4", *flags]
        return at_door(monkeypatch, capsys, "--op=chat", *settings)


def test_a_talk_over_a_pipe(trained, world, tmp_path, monkeypatch, capsys, caplog):
    path = world.utterances[0][0]
    model = world.speech_rwkv(adapter=next(trained.glob("*.pth")))
    chat = model.conversation()
    expected = ["".join(chat.reply(x, max_new_tokens=4)) for x in (path, "and before?")]
    chat.listen(path)
    expected.append("".join(chat.reply("this", max_new_tokens=4)))
    expected = [" ".join(x.split("\n")) for x in expected]

    file = tmp_path / "kept.safetensors"
    lines = ["/audio gone.wav", f"/audio {path}", "", "and before?", "/undo", "and before?", f"/save {file}"]
    lines += [f"/listen {path}", "this", "/sing", "/mic", "/save", "/quit", "not read any more"]
    status, printed = talk(world, trained, monkeypatch, capsys, "\n".join(lines))
    first, second, third = map(printable, expected)
    assert printed.out.split("\n") == [first, second, second, third, ""], "the same after /undo"
    assert status == 1
    errors = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    problems = ("gone.wav: no such file", "'/sing' is none of", "'/mic' is none of", "'/save' is none of")
    for error, problem in zip(errors, problems, strict=True):
        assert error.startswith(problem)
        assert "microphone" not in error, "it isn't there"

    lines = [f"/load {file}", f"/listen {path}", "this", "/new", "/help"]
    status, printed = talk(world, trained, monkeypatch, capsys, "\n".join(lines))
    assert (status, printed.out) == (0, f"{third}\n")


def test_the_microphone(monkeypatch):
    """Beside a stand-in for `sounddevice`, which is not installed here."""
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    with pytest.raises(AudioError, match="pip install sounddevice"):
        microphone.record(lambda: None)

    class Stream:
        def __init__(self, samplerate, channels, dtype, callback):
            assert (samplerate, channels, dtype) == (16_000, 1, "float32")
            self.callback = callback

        def __enter__(self):
            for block in (0.1, 0.2):
                self.callback(np.full((3, 1), block, np.float32), 3, None, None)

        def __exit__(self, *_):
            pass

    device = types.SimpleNamespace(InputStream=Stream, PortAudioError=RuntimeError)
    monkeypatch.setitem(sys.modules, "sounddevice", device)
    expected = pytest.approx([0.1] * 3 + [0.2] * 3)
    assert microphone.record(lambda: None).tolist() == expected
    assert next(microphone.listen()).tolist() == expected
    device.InputStream = lambda **_: (_ for _ in ()).throw(RuntimeError("no device"))
    with pytest.raises(AudioError, match="microphone: no device"):
        microphone.record(lambda: None)
