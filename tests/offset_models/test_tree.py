"""A tree of tokens is read in one pass as its paths are one by one, with and without a mask of our own."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from decoding import likeness
from pairs import KINDS, save_pair
from uld_offset_models.assistant import SmallModel
from uld_offset_models.loading import load_artifact
from uld_offset_models.pair import Pair
from uld_offset_models.pair_scorer import PairScorer
from uld_offset_models.running import holds_state
from uld_offset_models.scorer import Scorer
from uld_offset_models.track import Track
from uld_offset_models.tree import Growth, Tree, takes_masks
from uld_offset_models.tree_scorer import TreeScorer

PROMPTS = [[5, 17, 80, 300, 41], [9, 9, 200]]
CHAINS = [[12, 77, 60], [61]]
# Below the text's first n tokens, the chain's included: branches off the chain, along it, and below the text as it was before.
PATHS = [[(5, (1, 2)), (5, (1, 3, 4)), (6, (77, 8)), (8, (33,)), (4, (7,)), (8, ())], [(3, (5, 6, 7)), (4, (5, 6)), (4, ())]]


@torch.inference_mode()
def afresh(backbone: Any, ids: list[int]) -> torch.Tensor:
    return backbone(torch.tensor([ids])).last_hidden_state[0, -1]


def read(tree: Tree, backbone: Any) -> list[dict[tuple[int, tuple[int, ...]], torch.Tensor]]:
    tracks = [Track() for _ in PROMPTS]
    tree.grow([Growth(track, prompt) for track, prompt in zip(tracks, PROMPTS, strict=True)])
    found = tree.grow([Growth(t, chain, paths) for t, chain, paths in zip(tracks, CHAINS, PATHS, strict=True)])
    for track, prompt, chain, paths, states in zip(tracks, PROMPTS, CHAINS, PATHS, found, strict=True):
        text = prompt + chain
        assert track.tokens == text
        for at, path in paths:
            torch.testing.assert_close(states[at, path], afresh(backbone, [*text[:at], *path]), atol=2e-5, rtol=1e-4)
        for at in range(len(prompt) + 1, len(text) + 1):
            torch.testing.assert_close(states[at, ()], afresh(backbone, text[:at]), atol=2e-5, rtol=1e-4)
    again = tree.grow([Growth(track, (3,), ((len(track.tokens) + 1, (4,)),)) for track in tracks])
    for track, states in zip(tracks, again, strict=True):
        torch.testing.assert_close(states[len(track.tokens), (4,)], afresh(backbone, [*track.tokens, 4]), atol=2e-5, rtol=1e-4)
    return found


def test_a_tree_reads_as_its_paths_do(tiny_target: Path) -> None:
    backbone = likeness(tiny_target).backbone
    masked, unfolded = Tree(backbone), Tree(backbone, masks=False)
    assert masked.masks
    first, second = read(masked, backbone), read(unfolded, backbone)
    for one, other in zip(first, second, strict=True):
        assert one.keys() >= other.keys()
        for node, state in other.items():
            torch.testing.assert_close(one[node], state, atol=2e-5, rtol=1e-4)
    assert masked.passes == 3, "a prompt, a draft, one more token: one pass each"


@pytest.mark.parametrize("kind", ["mistral", "gemma"])
def test_sliding_windows_are_read_path_by_path(kind: str) -> None:
    from transformers import Gemma2Config, Gemma2Model, MistralConfig, MistralModel

    small = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "sliding_window": 4}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MistralModel(MistralConfig(**small, **more)) if kind == "mistral" else Gemma2Model(Gemma2Config(**small, **more))
    tree = Tree(model.eval())
    assert not takes_masks(model.config)
    assert not tree.masks
    read(tree, model)


def with_running_state(kind: str) -> Any:
    """A tiny model of these, with linear attention, short convolutions, or a state space; its head is tied."""
    from transformers import Lfm2Config, Lfm2ForCausalLM, MambaConfig, MambaForCausalLM, Qwen3NextConfig, Qwen3NextForCausalLM

    small = {"vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 2}
    more = {"intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    linear = {f"linear_{name}": 2 for name in ("num_key_heads", "num_value_heads", "conv_kernel_dim")}
    linear |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "head_dim": 8, "num_experts": 0, "mlp_only_layers": [0, 1]}  # type: ignore[dict-item]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind == "mamba":
            return MambaForCausalLM(MambaConfig(**small, state_size=4)).eval()
        if kind == "lfm2":
            return Lfm2ForCausalLM(Lfm2Config(**small, **more, layer_types=["conv", "full_attention"])).eval()
        layers = ["linear_attention", "full_attention"]
        return Qwen3NextForCausalLM(Qwen3NextConfig(**small, **more, **linear, layer_types=layers)).eval()


@pytest.mark.parametrize("kind", ["qwen3_next", "lfm2", "mamba"])
def test_a_running_state_is_copied_where_texts_branch(kind: str) -> None:
    backbone = with_running_state(kind).base_model
    assert holds_state(backbone.config)
    tree = Tree(backbone)
    read(tree, backbone)
    track = Track()
    tree.grow([Growth(track, [5, 17, 80, 300])])
    tree.grow([Growth(track, [12, 77, 60])])
    track.rollback(6)  # the states at hand are those after 4 and 7 tokens
    found = tree.grow([Growth(track, [9], [(5, (1, 2)), (3, (8,)), (7, (4,))])])[0]
    text = [5, 17, 80, 300, 12, 77, 9]
    assert track.tokens == text
    for (at, path), state in found.items():
        torch.testing.assert_close(state, afresh(backbone, [*text[:at], *path]), atol=2e-5, rtol=1e-4)
    assert found.keys() == {(7, ()), (5, (1,)), (5, (1, 2)), (3, (8,)), (7, (4,))}


@pytest.mark.parametrize("kind", ["qwen3_next", "mamba"])
def test_a_scorer_goes_on_from_a_running_state(kind: str) -> None:
    model = with_running_state(kind)
    scorer = Scorer(SmallModel(model.base_model, model.get_output_embeddings().weight.detach(), None, None))
    tracks = [scorer.track() for _ in PROMPTS]
    scorer.read(list(zip(tracks, PROMPTS, strict=True)), every=False)
    for track, prompt in zip(tracks, PROMPTS, strict=True):
        track.rollback(len(prompt) - 1)
    found = scorer.read([(track, chain) for track, chain in zip(tracks, CHAINS, strict=True)])
    for prompt, chain, readings in zip(PROMPTS, CHAINS, found, strict=True):
        for at, reading in enumerate(readings):
            whole = scorer.read([(scorer.track(), [*prompt[:-1], *chain[: at + 1]])], every=False)[0][0]
            np.testing.assert_allclose(reading.excess(), whole.excess(), atol=2e-4)


def test_a_scorer_of_trees_thinks_as_the_plain_one(tiny_target: Path) -> None:
    model = likeness(tiny_target)
    scorer, trees = Scorer(model), TreeScorer([Scorer(model)])
    tracks = [trees.track() for _ in PROMPTS]
    trees.read([(track, (prompt, ())) for track, prompt in zip(tracks, PROMPTS, strict=True)], every=False)
    assert [list(track.states) for track in tracks] == [[5], [3]], "of a prompt only the last state is kept"
    found = trees.read([(t, (chain, paths)) for t, chain, paths in zip(tracks, CHAINS, PATHS, strict=True)])
    for prompt, chain, paths, nodes in zip(PROMPTS, CHAINS, PATHS, found, strict=True):
        for at, path in paths:
            expected = scorer.read([(Track(), [*(prompt + chain)[:at], *path])], every=False)[0][0]
            assert nodes[at, path].peak == pytest.approx(expected.peak, abs=2e-4)
            assert nodes[at, path].gate == pytest.approx(expected.gate, abs=1e-5)
            np.testing.assert_allclose(np.log(nodes[at, path].chances()[0]), expected.excess() - np.log(scorer.rows), atol=2e-4)
    tracks[0].rollback(6)
    assert max(tracks[0].states) == 6
    again = trees.read([(tracks[0], ((99,), ((6, ()), (7, (1,)))))])[0]
    expected = scorer.read([(Track(), [*PROMPTS[0], 12, 99, 1])], every=False)[0][0]
    assert again[7, (1,)].peak == pytest.approx(expected.peak, abs=2e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("masks", [None, False])
def test_pairs_are_read_through_trees(tiny_target: Path, tmp_path: Path, kind: str, masks: bool | None) -> None:
    pair = load_artifact(save_pair(tmp_path / "pair", tiny_target, kind, gated=True)).model
    assert isinstance(pair, Pair)
    scorer, trees = PairScorer(pair), TreeScorer([PairScorer(pair)], masks=masks)
    tracks = [trees.track() for _ in PROMPTS]
    trees.read([(track, (prompt, ())) for track, prompt in zip(tracks, PROMPTS, strict=True)], every=False)
    found = trees.read([(t, (chain, paths)) for t, chain, paths in zip(tracks, CHAINS, PATHS, strict=True)])
    for prompt, chain, paths, nodes in zip(PROMPTS, CHAINS, PATHS, found, strict=True):
        for at, path in paths:
            expected = scorer.read([(scorer.track(), [*(prompt + chain)[:at], *path])], every=False)[0][0]
            assert nodes[at, path].gate == pytest.approx(expected.gate, abs=1e-5)
            np.testing.assert_allclose(np.log(nodes[at, path].chances()), expected.logprobs(), atol=5e-4)
