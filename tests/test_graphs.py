"""Decoding steps as graphs, without a GPU: in the place of a graph, the step itself runs again on the same memory."""

import gc
import weakref

import pytest
import torch

from rwkv_speech.decoding import decode, generate
from rwkv_speech.lm import graphs, peft
from rwkv_speech.lm.initialise import official_sizes, random_weights
from rwkv_speech.lm.language_model import LanguageModel
from rwkv_speech.lm.rwkv6 import RWKV6
from rwkv_speech.lm.rwkv7 import RWKV7
from rwkv_speech.options import DecodingOptions


@pytest.fixture(params=[6, 7])
def model(request) -> LanguageModel:
    sizes = official_sizes(generation=request.param, n_layer=3, n_embd=64, vocab_size=50, head_size=32)
    weights = random_weights(sizes, seed=1, dtype=torch.float32, time_state=True)
    return {6: RWKV6, 7: RWKV7}[request.param].from_tensors(sizes, weights, device="cpu", dtype=torch.float32)


@pytest.fixture
def recorded(monkeypatch) -> list[int]:
    """Graphs on the CPU; a number for each that was made."""
    made = []

    class Graph(graphs._Graph):
        def _run(self, model):
            first = getattr(self, "hidden", None)
            super()._run(model)
            if first is not None:  # outputs have one place, too
                first.copy_(self.hidden)
                self.hidden = first

    def record(run, device):
        made.append(1)
        run()
        return run

    monkeypatch.setattr(graphs, "_Graph", Graph)
    monkeypatch.setattr(graphs, "_has_graphs", lambda x: True)
    monkeypatch.setattr(graphs, "_record", record)
    return made


def prompts(model: LanguageModel, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    lengths = torch.randint(1, 6, (count,), generator=generator)
    return torch.randn(count, 6, model.sizes.n_embd, generator=generator), lengths


@pytest.mark.parametrize("options", [{}, {"beam": 3}, {"temperature": 1.0}], ids=str)
def test_answers_and_states_are_those_of_plain_steps(model, recorded, monkeypatch, options):
    """Samples leave one after the other, so that several graphs serve, each with rows to spare."""
    embeddings, lengths = prompts(model, 6)
    how = {"max_new_tokens": [3, 12, 5, 1, 9, 20], "options": DecodingOptions(**options), "end": -1, "keep_state": True}
    got = decode(model, embeddings, lengths, **how)
    assert len(recorded) >= 2
    monkeypatch.setattr(graphs, "takes", lambda *_: False)
    for one, other in zip(got, decode(model, embeddings, lengths, **how), strict=True):
        assert one.tokens == other.tokens
        assert one.score == pytest.approx(other.score, abs=1e-4)
        for x, y in zip(one.state.state_dict().values(), other.state.state_dict().values(), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


def test_answers_in_turn_do_not_disturb_each_other(model, recorded):
    """Two answers of one model share a graph and its memory."""
    embeddings, lengths = prompts(model, 2)
    alone = [x.tokens for x in decode(model, embeddings, lengths, max_new_tokens=[15, 15], end=-1)]
    with torch.inference_mode():
        both = []
        for i in range(2):
            hidden, state = model(embeddings[i : i + 1, : lengths[i]])
            both.append(generate(model, hidden[:, -1], state, max_new_tokens=[15], end=-1))
        found = [[], []]
        for _ in range(15):
            for tokens, steps in zip(found, both, strict=True):
                tokens += [token for _, token in next(steps)]
    assert found == alone


def test_a_state_that_was_given_stays_as_it_was(model, recorded):
    with torch.inference_mode():
        _, state = model(torch.tensor([[1, 2]]))
        before = state.clone()
        first, after = model(torch.tensor([[3]]), state)
        kept, said = after.clone(), first.clone()
        model(torch.tensor([[4]]), after)
        again, _ = model(torch.tensor([[3]]), state)
    assert torch.equal(first, said)
    assert torch.equal(first, again)
    for had, has in ((before, state), (kept, after)):
        assert all(map(torch.equal, had.state_dict().values(), has.state_dict().values()))


def test_a_graph_is_made_anew_where_weights_are_others(model, recorded):
    def answer() -> torch.Tensor:
        with torch.inference_mode():
            _, state = model(torch.tensor([[1, 2]]))
            return model(torch.tensor([[3]]), state)[0]

    first = answer()
    assert torch.equal(answer(), first)
    assert len(recorded) == 1
    with torch.no_grad():
        model.ln_out.weight.mul_(2)  # in place: what a graph reads
        model.blocks[0].att.output.weight.mul_(2)
    assert not torch.equal(answer(), first)
    assert len(recorded) == 1
    model.double().float()
    answer()
    assert len(recorded) == 2
    weights = model.blocks[0].att.output.weight
    weights.data = torch.zeros_like(weights)
    assert not torch.equal(answer(), first)
    assert len(recorded) == 3


def test_weights_that_are_buffers_are_looked_at_too(model, recorded):
    """Under DeepSpeed the frozen ones are."""
    weight = model.ln_out.weight.detach().clone()
    del model.ln_out.weight
    model.ln_out.register_buffer("weight", weight)
    with torch.inference_mode():
        model(torch.tensor([[3]]))
        model.ln_out.weight.data = weight.clone()
        model(torch.tensor([[3]]))
    assert len(recorded) == 2


def test_a_model_that_is_no_longer_packed_has_another_graph(recorded):
    sizes = official_sizes(generation=6, n_layer=1, n_embd=64, vocab_size=50)
    weights = random_weights(sizes, seed=1)
    model = RWKV6.from_tensors(sizes, weights, device="cpu", dtype=torch.float32, quant="int8")
    for _ in range(2):
        with torch.inference_mode():
            model(torch.tensor([[3]]))
        model.quant = None
    assert len(recorded) == 2


def test_beside_peft_there_are_none(model, recorded):
    peft.inject(model, {"peft_type": "LORA", "r": 4})
    with torch.inference_mode():
        model(torch.tensor([[3]]))
    assert not recorded


def test_an_error_in_a_step_leaves_nothing_half_done(model, recorded, monkeypatch):
    """What its memory holds then is no state that anybody has."""
    with torch.inference_mode():
        _, state = model(torch.tensor([[1]]))
        (graph,) = graphs._graphs[model].values()
        with monkeypatch.context() as patch:
            patch.setattr(graph, "replay", lambda replay=graph.replay: replay() or 1 / 0)
            with pytest.raises(ZeroDivisionError):
                model(torch.tensor([[3]]), state)
        found, _ = model(torch.tensor([[3]]), state)
        plain, _ = model.run(model.embed(torch.tensor([[3]])), state)
    torch.testing.assert_close(found, plain)


def test_a_state_that_stands_there_is_not_copied_there_nor_kept(model, recorded, monkeypatch):
    written, write = [], graphs._Graph._write
    monkeypatch.setattr(graphs._Graph, "_write", lambda *args: written.append(1) or write(*args))
    with torch.inference_mode():
        _, state = model(torch.tensor([[1]]))
        written.clear()
        for _ in range(3):
            _, state = model(torch.tensor([[2]]), state)
    assert len(written) == 3  # by the step itself
    (graph,) = graphs._graphs[model].values()
    assert graph.holds(state)
    del state
    assert graph.held() is None


def test_training_and_padded_batches_do_without(model, recorded):
    model(torch.tensor([[3]]))
    with torch.no_grad():
        model(torch.tensor([[3]]))
    with torch.inference_mode():
        model(torch.tensor([[3], [4]]), None, torch.tensor([1, 1]))
        model(torch.tensor([[3, 4]]))
        model(torch.ones(graphs.ROWS[-1] + 1, 1, dtype=torch.long))
    assert not recorded


def test_where_no_graph_can_be_made_the_step_is_plain(model, recorded, monkeypatch, caplog):
    graphs._warn.cache_clear()

    def fail(run, device):
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(graphs, "_record", fail)
    with torch.inference_mode():
        _, state = model(torch.tensor([[1, 2]]))
        for _ in range(2):
            found, _ = model(torch.tensor([[3]]), state)
        model(torch.tensor([[3]] * 5))
        plain, _ = model.run(model.embed(torch.tensor([[3]])), state)
    assert torch.equal(found, plain)
    (line,) = (record.getMessage() for record in caplog.records)
    assert "CUDA error: operation not permitted when stream is capturing" in line


def test_graphs_go_with_their_model(recorded, monkeypatch):
    def record(run, device):
        run()
        return lambda: None  # a graph of the driver's does not hold the model either

    monkeypatch.setattr(graphs, "_record", record)
    sizes = official_sizes(generation=7, n_layer=1, n_embd=64, vocab_size=50)
    model = RWKV7.from_tensors(sizes, random_weights(sizes, seed=1), device="cpu", dtype=torch.float32)
    with torch.inference_mode():
        model(torch.tensor([[3]]))
    gone = weakref.ref(model), weakref.ref(graphs._graphs[model][1])
    del model
    gc.collect()
    assert [x() for x in gone] == [None, None]


def test_forgotten_graphs_are_made_again(model, recorded):
    for _ in range(2):
        with torch.inference_mode():
            model(torch.tensor([[3]]))
        graphs.forget(model)
        assert model not in graphs._graphs
    assert len(recorded) == 2
