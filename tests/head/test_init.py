"""A new head is made of the target's own weights."""

import copy
import dataclasses

import pytest
import torch
from transformers import LlamaForCausalLM

from drafthead.head.checkpoint import load_head, save_head
from drafthead.head.config import HeadConfig, head_config
from drafthead.head.formats import Provenance
from drafthead.head.init import init_from_target, new_head, target_layer
from drafthead.head.model import Eagle3Head
from drafthead.recipe import HeadSection
from drafthead.targets import load_target
from tests.refused import refused

D2T = torch.tensor([2, 2, 5, 90])  # target ids 2, 3, 7, 93


@pytest.fixture
def target(llama):
    return load_target(llama)


BARE = {"fc_norm": False, "norm_before_residual": False, "norm_output": False}


def config(target, **section) -> HeadConfig:
    layers = target.default_aux_layers()
    return head_config(HeadSection(intermediate_size=128, **section), target, layers, len(D2T))


def make(target, section=BARE, **options) -> Eagle3Head:
    weight, _ = target.final_norm()
    return init_from_target(config(target, **section), D2T, target.lm_head(), weight, **options)


def test_the_recipe_leaves_open_what_the_target_says(target):
    made = head_config(HeadSection(num_key_value_heads=1), target, (1, 2, 3), 100)
    assert made.hidden_size == made.target_hidden_size == target.hidden_size
    assert made.intermediate_size == 4 * target.hidden_size
    assert (made.num_attention_heads, made.num_key_value_heads) == (2, 1)
    assert made.rms_norm_eps == target.rms_norm_eps
    assert made.rope_theta == target.rope_theta
    assert made.draft_vocab_size == 100
    with refused("head.hidden_size", 32, 64):
        head_config(HeadSection(hidden_size=32), target, (1, 2, 3), 100)


def test_query_heads_divide_the_width_as_llama_has_it(target, tmp_path):
    """GLM-4.5 has 96 heads of 128 at a width of 5120, which LlamaConfig refuses to read: such a
    head was trained to its end and then could not be loaded."""
    glm = dataclasses.replace(target, config=copy.copy(target.config))
    glm.config.num_attention_heads, glm.config.num_key_value_heads = 6, 2
    made = config(glm)
    assert (made.num_attention_heads, made.num_key_value_heads) == (4, 2)
    head = new_head(HeadSection(), glm, (1, 2), D2T, seed=0)
    save_head(head, tmp_path, Provenance())
    assert load_head(tmp_path).head.config.num_attention_heads == 4
    with refused("hidden_size", 64, "num_attention_heads", 3):
        config(target, num_attention_heads=3)


def test_a_recipe_makes_a_head(target):
    section = HeadSection(
        intermediate_size=128, num_hidden_layers=2, fc_norm=False, layer_from_target=True
    )
    head = new_head(section, target, (1, 3), D2T, seed=3)
    assert len(head.layers) == 2
    flags = head.config.fc_norm, head.config.norm_before_residual, head.config.norm_output
    assert flags == (False, True, True)
    assert head.config.aux_layer_ids == (1, 3)
    taken = target_layer(target)["mlp.up_proj.weight"]
    assert torch.equal(head.layers[0].mlp.up_proj.weight, taken)
    assert not torch.equal(head.layers[1].mlp.up_proj.weight, taken)


def test_vocabulary_side_is_the_targets(target):
    head = make(target)
    assert torch.equal(head.lm_head.weight, target.lm_head()[[2, 3, 7, 93]].float())
    assert torch.equal(head.norm.weight, target.final_norm()[0].float())
    assert head.target_ids().tolist() == [2, 3, 7, 93]
    assert head.t2d.nonzero().flatten().tolist() == [2, 3, 7, 93]


def test_the_deepest_state_passes_through(target):
    head = make(target)
    aux = torch.randn(5, len(head.config.aux_layer_ids), target.hidden_size)
    others = aux.clone()
    others[:, :-1] = 0
    assert torch.equal(head.fuse(others), aux[:, -1])
    assert 0 < (head.fuse(aux) - aux[:, -1]).norm() < 0.2 * aux[:, -1].norm()


@pytest.mark.parametrize("together", [False, True])
def test_normed_the_deepest_state_passes_through_in_its_direction(target, together):
    head = make(target, {"fc_norm": False, "norm_before_fc": True} if together else {})
    aux = torch.randn(5, len(head.config.aux_layer_ids), target.hidden_size) * 300
    aux[:, :-1] = 0
    passed, deepest = head.fuse(aux), aux[:, -1]
    assert torch.cosine_similarity(passed, deepest, dim=-1).min() > 0.999
    size = passed.square().mean(-1).sqrt()
    expected = len(head.config.aux_layer_ids) ** 0.5 if together else 1.0
    torch.testing.assert_close(size, torch.full((5,), expected), atol=0.05, rtol=0)


def test_a_seed_is_a_head(target):
    one, same, other = make(target), make(target), make(target, seed=1)
    key = "layers.0.mlp.up_proj.weight"
    assert torch.equal(one.state_dict()[key], same.state_dict()[key])
    assert not torch.equal(one.state_dict()[key], other.state_dict()[key])
    assert not torch.equal(make(target, fc="random").fc.weight, one.fc.weight)


def test_with_the_targets_last_layer_a_head_computes_what_the_target_does(target, llama):
    """Given the state that enters the last layer, blind to embeddings, head and target agree."""
    head = make(target, layer=target_layer(target))
    head.layers[0].self_attn.q_proj.weight.data[:, : target.hidden_size] = 0
    head.layers[0].self_attn.k_proj.weight.data[:, : target.hidden_size] = 0
    head.layers[0].self_attn.v_proj.weight.data[:, : target.hidden_size] = 0
    ids = torch.tensor([[1, 40, 77, 200, 31, 8, 300]])
    model = LlamaForCausalLM.from_pretrained(llama, dtype=torch.float32)
    with torch.no_grad():
        out = model(ids, output_hidden_states=True)

        def causal(layer, q, k, v):
            q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
            mixed = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=True
            )
            return mixed[0].transpose(0, 1)

        entering = out.hidden_states[target.num_layers - 1][0]
        decoded = head.decode(torch.randn(7, 64), entering, torch.arange(7), causal)
        logits = head.logits(head.output(decoded))
    torch.testing.assert_close(logits, out.logits[0][:, [2, 3, 7, 93]], atol=1e-4, rtol=1e-4)


def test_layers_of_another_layout_are_refused(lfm2_moe):
    with refused("layer 5", "feed_forward.expert_bias"):
        target_layer(load_target(lfm2_moe))


def test_what_does_not_fit_is_refused(target):
    weight, _ = target.final_norm()
    with refused([100, 64], "hidden_size", "vocab_size"):
        init_from_target(config(target), D2T, target.lm_head()[:100], weight)
    with refused("zero", "deepest", "random"):
        make(target, fc="zero")
    with refused(field="head.layer_from_target"):
        make(target, layer={"self_attn.q_proj.weight": torch.ones(3, 3)})
