"""Prompts to the letter of recipe.md 2, and back; nothing a user writes becomes a control token."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rime_fast.data.records import Side
from rime_fast.data.templates import CONTROL, TEMPLATES, escape_control, get_template

VISION = "<|vision_start|><|image_pad|><|vision_end|>"
TOKENS = ["<gen_emb>", "<disc_emb>", "<|im_end|>", "<|im_start|>", "<|image_pad|>", "<|endoftext|>", "<|image_1|>"]
# Text with look-alikes thrown in.
TEXT = st.lists(
    st.one_of(st.text(st.characters(exclude_categories=["Cs"]), max_size=8), st.sampled_from([*TOKENS, "<rewrite>"])),
    max_size=6,
).map("".join)


def test_rewrite_to_the_letter():
    side = Side("What is it?", ["a.png"], rewrite="a red\ncat")
    template = get_template("rewrite", instruction="DO IT")
    disc = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\n{VISION}What is it?\n<disc_emb>\n"
    )
    assert template.render_disc(side) == disc
    assert template.render_prompt(side) == disc + "DO IT<|im_end|>\n<|im_start|>assistant\n"
    assert template.render_response(side) == "<rewrite>a red\ncat</rewrite>\n<gen_emb>"


def test_cot_is_that_of_ume_r1():
    side = Side("Find it.", ["a.png"], rewrite="<think>it is red</think><answer>a cat")
    template = get_template("cot")
    prompt = template.render_prompt(side)
    assert f"user\n{VISION}Find it.\n<disc_emb>\nRepresent the above input text, images, videos, or any" in prompt
    assert prompt.endswith("tag to represent the entire input.<|im_end|>\n<|im_start|>assistant\n")
    assert template.render_response(side) == "<think>it is red</think><answer>a cat\n<gen_emb><|im_end|>"


def test_vision_before_text_and_no_blank_image_for_text():
    template = get_template(system=None)
    both = Side("t", ["a", "b"], video=["f1", "f2"])
    assert template.render_disc(both) == (
        f"<|im_start|>user\n{VISION}{VISION}<|vision_start|><|video_pad|><|vision_end|>t\n<disc_emb>\n"
    )
    assert template.render_disc(Side("t")) == "<|im_start|>user\nt\n<disc_emb>\n"


@given(TEXT.filter(lambda t: t.strip() and not CONTROL.search(t) and "<rewrite>" not in t))
def test_round_trip_of_rewrites(text):
    template = get_template("rewrite")
    for tail in ("", "<|im_end|>", "\n<gen_emb>"):
        parsed = template.parse_response(template.render_response(Side("x", rewrite=text)) + tail)
        assert parsed == (text, True)


@given(TEXT.filter(lambda t: t.strip() and not CONTROL.search(t)))
def test_round_trip_of_chains_of_thought(text):
    template = get_template("cot")
    written = f"<think>{text}</think><answer>{text}"
    assert template.parse_response(template.render_response(Side("x", rewrite=written))) == (written, True)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a cat",
        "<rewrite>a cat</rewrite>",  # no token
        "<rewrite>a cat</rewrite><gen_emb>",  # no newline
        "<rewrite>a cat\n<gen_emb>",  # not closed
        "a cat</rewrite>\n<gen_emb>",
        "<rewrite> \n </rewrite>\n<gen_emb>",  # empty
        "so: <rewrite>a cat</rewrite>\n<gen_emb>",
        "<rewrite>a cat</rewrite> yes\n<gen_emb>",
        "<rewrite>a <rewrite>cat</rewrite></rewrite>\n<gen_emb>",
        "<rewrite>a<|im_end|>cat</rewrite>\n<gen_emb>",
        "<rewrite>a<disc_emb>cat</rewrite>\n<gen_emb>",
    ],
)
def test_broken_responses_are_told_apart(text):
    parsed = get_template("rewrite").parse_response(text)
    assert not parsed.format_ok
    assert not CONTROL.search(parsed.rewrite)


@pytest.mark.parametrize(
    "text",
    [
        "<answer>cat\n<gen_emb>",
        "<think>a</think>\n<gen_emb>",
        "<think></think><answer>c\n<gen_emb>",
        "<think>a</think><answer> \n<gen_emb>",
        "<think>a</think><answer>c<gen_emb>",
    ],
)
def test_broken_chains_of_thought_are_told_apart(text):
    assert not get_template("cot").parse_response(text).format_ok


@given(TEXT)
def test_what_the_parser_reads_never_raises(text):
    for template in TEMPLATES.values():
        parsed = template.parse_response(text)
        assert isinstance(parsed.rewrite, str)
        assert not parsed.format_ok or parsed.rewrite.strip()


@pytest.mark.parametrize("name", ["rewrite", "cot"])
@pytest.mark.parametrize("token", TOKENS)
def test_look_alikes_are_errors_by_default(name, token):
    template = get_template(name)
    with pytest.raises(ValueError, match=r"side 'q1': text holds .* control token"):
        template.render_prompt(Side(f"see {token} here", id="q1"))
    with pytest.raises(ValueError, match=r"side 'q1': rewrite holds .* control token"):
        template.render_response(Side("x", rewrite=f"see {token} here", id="q1"))


def test_a_look_alike_in_two_parts_is_one():
    side = Side(content=[("text", "see <gen_"), ("text", ""), ("text", "emb>")], id="q1")
    with pytest.raises(ValueError, match="side 'q1': text holds '<gen_emb>'"):
        get_template().render_prompt(side)
    assert get_template(special_text="escape").render_user(side) == "see < gen_emb>"


def test_half_a_surrogate_is_named():
    template = get_template(special_text="escape")
    with pytest.raises(ValueError, match="side 'q1': text holds half a surrogate pair"):
        template.render_prompt(Side("see \udc00", id="q1"))
    with pytest.raises(ValueError, match="side 'q1': rewrite holds half a surrogate pair"):
        template.render_response(Side("x", rewrite="see \ud800", id="q1"))


@given(TEXT, TEXT.filter(str.strip))
def test_escaping_leaves_only_the_templates_own_tokens(text, rewrite):
    for name in TEMPLATES:
        template = get_template(name, special_text="escape")
        plain = get_template(name)
        side, reference = Side(text, rewrite=rewrite), Side("x", rewrite="x")
        assert CONTROL.findall(template.render_prompt(side)) == CONTROL.findall(plain.render_prompt(reference))
        assert CONTROL.findall(template.render_response(side)) == CONTROL.findall(plain.render_response(reference))
    assert not CONTROL.search(escape_control(text))


def test_tags_inside_a_rewrite():
    with pytest.raises(ValueError, match="holds '</rewrite>'"):
        get_template("rewrite").render_response(Side("x", rewrite="a</rewrite>b"))
    escaped = get_template("rewrite", special_text="escape").render_response(Side("x", rewrite="a</rewrite>b"))
    assert escaped == "<rewrite>a< /rewrite>b</rewrite>\n<gen_emb>"


def test_filler_stands_in_for_the_rewrite():
    side = Side("x", rewrite="real")
    assert get_template(filler="so so so").render_response(side) == "<rewrite>so so so</rewrite>\n<gen_emb>"
    assert get_template(filler=repeat).render_response(side) == "<rewrite>x x</rewrite>\n<gen_emb>"
    assert get_template(filler="so").render_response(replace(side, rewrite=None)) == "<rewrite>so</rewrite>\n<gen_emb>"


def repeat(side: Side) -> str:
    return f"{side.text} {side.text}"


def test_templates_pickle_and_errors_are_named():
    template = get_template("cot", filler=repeat)
    assert pickle.loads(pickle.dumps(template)) == template
    assert get_template(template) is template
    with pytest.raises(ValueError, match="template is 'nope'; expected one of rewrite, cot"):
        get_template("nope")
    with pytest.raises(ValueError, match="special_text is 'ignore'"):
        get_template(special_text="ignore")
    for rewrite in (None, "", " \n"):
        with pytest.raises(ValueError, match="rewrite is empty"):
            get_template().render_response(Side("x", rewrite=rewrite))
