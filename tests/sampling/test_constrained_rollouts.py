"""Rollouts under a constraint, and that training scores what was sampled."""

import dataclasses
import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import jsonschema
import numpy as np
import pytest
import tokenizers

from jaxrl_llm.envs.single_turn import SingleTurnEnv
from jaxrl_llm.models import DecoderConfig, load_tokenizer, make_decoder
from jaxrl_llm.models.tokenizer import wrap_tokenizer
from jaxrl_llm.sampling import constrain, json_schema_automaton, regex_automaton, rollout, score_rollout, token_trie
from jaxrl_llm.sampling.constraints import allowed_tokens
from jaxrl_llm.sampling.score import rollout_states
from jaxrl_llm.types import Decoding
from tests.sampling.worlds import MODEL, VOCAB, EchoEnv, random_prompts

TASKS = random_prompts(4)
PARAMS = jax.tree.map(lambda x: 1.5 * x, jax.jit(MODEL.init)(jax.random.key(1)))
STOP = 11
TRIGGER = 38  # a token that this policy likes
SEQUENCES = [[(20, 21, 22), (20, 21), (24,)], [(token,) for token in range(39, 60)]]
TRIES = [token_trie(sequences, end=(STOP,)) for sequences in SEQUENCES]
CHOICES = [0, 1, 0, 1]
CONSTRAINT = constrain(*TRIES, vocab_size=VOCAB, choices=CHOICES, trigger=(TRIGGER,), forced=(6, 5), banned=(3,))
SCORE = partial(score_rollout, MODEL, decoding=Decoding(temperature=0.8, top_k=20))
SCORE_CONSTRAINED = jax.jit(SCORE)
FOLDER = Path(__file__).parents[1] / "models" / "golden" / "tokenizers"
LENGTH_ENV = SingleTurnEnv(lambda task, tokens, length: length.astype(jnp.float32))


@partial(jax.jit, static_argnames=("num_slots", "decoding"))
def play(params, key, constraint, num_slots=8, decoding=Decoding(temperature=0.8, top_k=20)):
    return rollout(
        *(MODEL, params, EchoEnv(), TASKS, key),
        max_length=56,
        max_turns=3,
        max_turn_tokens=12,
        stop_sequences=[[STOP]],
        decoding=decoding,
        constraint=constraint,
        group_size=4,
        num_slots=num_slots,
    )


@pytest.fixture(scope="module")
def sampled():
    return play(PARAMS, jax.random.key(0), CONSTRAINT)


def turns_of(sampled):
    """(group, tokens) of every turn."""
    for row in range(len(sampled.lengths)):
        turns = np.asarray(sampled.turn_ids[row])
        for turn in range(turns.max() + 1):
            yield int(sampled.group_ids[row]), np.asarray(sampled.tokens[row])[turns == turn].tolist()


def test_every_turn_obeys(sampled):
    """Each begins as it is forced to, nothing banned is in it, and behind the trigger stands what the group may say."""
    entered = 0
    for group, tokens in turns_of(sampled):
        assert tokens[:2] == [6, 5] and 3 not in tokens
        if TRIGGER in tokens:
            said = tokens[tokens.index(TRIGGER) + 1 :]
            choices = [[*sequence, STOP] for sequence in SEQUENCES[CHOICES[group]]]
            assert said in choices or len(tokens) == 12 and any(choice[: len(said)] == said for choice in choices)
            entered += bool(said)
    assert entered > 5, "the trigger must occur in this test"


def test_slots_do_not_matter(sampled):
    other = play(PARAMS, jax.random.key(0), CONSTRAINT, num_slots=3)
    np.testing.assert_array_equal(other.tokens, sampled.tokens)
    np.testing.assert_allclose(other.free_logprobs, sampled.free_logprobs, atol=1e-4)


def test_scored_as_sampled(sampled):
    """The first ratio is 1 on every token, constrained or not; "free" gives the free log-probs."""
    logprobs, entropy = SCORE_CONSTRAINED(PARAMS, sampled, constraint=CONSTRAINT)
    # two orders of summation of float32 logits of size 30
    np.testing.assert_allclose(logprobs, sampled.logprobs, atol=1e-4)
    free, free_entropy = jax.jit(partial(SCORE, constraint="free"))(PARAMS, sampled)
    np.testing.assert_allclose(free, sampled.free_logprobs, atol=1e-4)
    states, mask = rollout_states(CONSTRAINT, sampled), np.asarray(sampled.mask)
    alone = mask & (np.asarray(jax.vmap(partial(allowed_tokens, CONSTRAINT))(states)).sum(-1) == 1)
    assert alone.sum() > 20 and np.all(np.asarray(logprobs)[alone] == 0) and np.all(np.asarray(free)[alone] < 0)
    # no choice, no entropy: up to the rounding of a difference of two logits of size 30
    np.testing.assert_allclose(np.asarray(entropy)[alone], 0, atol=1e-5)
    assert np.all(np.asarray(free_entropy)[mask] > 0)


def test_gradients_of_the_score(sampled):
    """Against whole rows of logits, masked."""
    weights = jax.random.normal(jax.random.key(5), sampled.tokens.shape)
    decoding = Decoding(temperature=0.8, top_k=20)

    def ours(params):
        logprobs, entropy = score_rollout(
            *(MODEL, params, sampled), decoding=decoding, constraint=CONSTRAINT, entropy_gradient=True
        )
        return jnp.sum(weights * (logprobs + 0.1 * entropy))

    def plain(params):
        logits = MODEL.logits(params, sampled.tokens[:, :-1]) / decoding.temperature
        states = rollout_states(CONSTRAINT, sampled)[:, 1:]
        logits = jnp.where(jax.vmap(partial(allowed_tokens, CONSTRAINT))(states), logits, -1e9)
        kept = logits >= jax.lax.top_k(logits, decoding.top_k)[0][..., -1:]
        probs = jax.nn.softmax(logits)
        entropy = -jnp.sum(probs * jax.nn.log_softmax(logits), axis=-1)
        logprobs = jax.nn.log_softmax(jnp.where(kept, logits, -1e9))
        picked = jnp.take_along_axis(logprobs, sampled.tokens[:, 1:, None], axis=-1)[..., 0]
        return jnp.sum(jnp.where(sampled.mask, weights, 0)[:, 1:] * (picked + 0.1 * entropy))

    (a, a_grads), (b, b_grads) = jax.jit(jax.value_and_grad(ours))(PARAMS), jax.jit(jax.value_and_grad(plain))(PARAMS)
    np.testing.assert_allclose(a, b, rtol=1e-4)
    for x, y in zip(jax.tree.leaves(a_grads), jax.tree.leaves(b_grads), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-4 * float(jnp.abs(y).max()))  # float32 sums over 400 tokens


def test_refusals(sampled):
    with pytest.raises(ValueError, match="score it with the same constraint=, or with constraint='free'"):
        score_rollout(MODEL, PARAMS, sampled, decoding=sampled.decoding)
    free = play(PARAMS, jax.random.key(0), None)
    assert free.free_logprobs is None
    with pytest.raises(ValueError, match="sampled without a constraint"):
        score_rollout(MODEL, PARAMS, free, decoding=free.decoding, constraint=CONSTRAINT)


def test_a_token_that_is_not_allowed_has_no_logprob(sampled):
    """Another constraint than the sampler's is loud: NaN, where a finite number would be a ratio."""
    logprobs, _ = SCORE_CONSTRAINED(
        PARAMS, sampled, constraint=dataclasses.replace(CONSTRAINT, choices=CONSTRAINT.choices[::-1])
    )
    turns = np.asarray(sampled.turn_ids)
    behind = np.zeros(turns.shape, bool)
    behind[:, 1:] = (sampled.tokens[:, :-1] == TRIGGER) & (turns[:, 1:] >= 0) & (turns[:, 1:] == turns[:, :-1])
    np.testing.assert_array_equal(np.isnan(logprobs).any(axis=1), behind.any(axis=1))
    assert np.isnan(logprobs)[behind].all() and not np.isnan(logprobs)[~np.asarray(sampled.mask)].any()


SIZES = {
    "max_length": 160,
    "max_turns": 1,
    "max_turn_tokens": 150,
    "group_size": 256,
    "num_slots": 256,
    "stop_sequences": (),
}
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "kind": {"enum": ["city", "country", 3]},
        "seen": {"type": "array", "items": {"type": ["boolean", "null"]}, "maxItems": 3},
        "where": {"type": "object", "properties": {"north": {"type": "integer"}}, "required": ["north"]},
    },
    "required": ["name", "kind", "where"],
}


@pytest.mark.parametrize("name", ["chatml", "llama"])
def test_json_of_a_schema(name):
    """Whatever a random policy writes, in bytes of characters too, parses and validates."""
    tokenizer = load_tokenizer(FOLDER / name)
    model = make_decoder(DecoderConfig(832, width=16, num_layers=1, num_heads=2, num_kv_heads=1, ffn_width=16))
    sampled = jax.jit(partial(rollout, model, env=LENGTH_ENV), static_argnames=tuple(SIZES))(
        jax.jit(model.init)(jax.random.key(0)),
        tasks=random_prompts(1),
        key=jax.random.key(3),
        constraint=constrain(json_schema_automaton(SCHEMA, tokenizer), vocab_size=832),
        **SIZES | {"stop_sequences": tuple((end,) for end in tokenizer.eos_ids)},
    )
    texts = set()
    for _, tokens in turns_of(sampled):
        assert tokens[-1] in tokenizer.eos_ids, "a policy of this size writes no integer of a hundred digits"
        text = tokenizer.decode(tokens[:-1])
        jsonschema.validate(json.loads(text), SCHEMA)
        texts.add(text)
    assert len(texts) > 250
    assert any(not text.isascii() for text in texts), "characters in more than one token must occur"


def test_patterns():
    """A pattern's tokens are all that spell it; it ends with an end token, or where nothing can follow."""
    tokenizer = load_tokenizer(FOLDER / "chatml")
    spelled = lambda automaton: {tokenizer.decode([i]) for i in automaton.tokens if i not in tokenizer.eos_ids}  # noqa: E731
    assert spelled(regex_automaton("in|on|i", tokenizer)) == {"i", "in", "o", "on", "n"}
    assert set(regex_automaton("[ab]", tokenizer, end=()).targets) == {-1}
    with pytest.raises(ValueError, match="give end tokens"):
        regex_automaton("a+", tokenizer, end=())
    with pytest.raises(ValueError, match="DFA"):
        regex_automaton("(a", tokenizer)
    words = wrap_tokenizer(tokenizers.Tokenizer(tokenizers.models.WordPiece({"a": 0}, unk_token="a")))
    with pytest.raises(ValueError, match="no byte strings"):
        regex_automaton("a", words)


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "integer", "minimum": 3}, "'minimum' of a JSON schema is not enforced"),
        ({"type": "array", "items": {"not": {}}}, "'not' of a JSON schema is not enforced"),
        ({"type": "word"}, "Unsupported type: word"),
        ({"$ref": "#/$defs/x", "$defs": {"x": {"type": "array", "items": {"$ref": "#/$defs/x"}}}}, "limit reached"),
    ],
)
def test_schemas_that_are_refused(schema, message):
    with pytest.raises(ValueError, match=message):
        json_schema_automaton(schema, load_tokenizer(FOLDER / "chatml"))
