"""Chat templates by name or file, and what they change about a tokenizer."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from qdora.data.chat_templates import NAMED, end_with_turns, use_chat_template, use_saved_template
from qdora.data.chats import messages
from qdora.data.rows import Turn
from qdora.errors import InputError

TOKENS = {
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "plain": (),
}
CHAT = [Turn("system", "Be brief."), Turn("user", "Who?"), Turn("assistant", "Ben."), Turn("user", "Why?")]
RENDERED = {
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nWho?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nBen.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWho?<|im_end|>\n"
    "<|im_start|>assistant\nBen.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n",
    "plain": "<s>### System:\nBe brief.\n\n### User:\nWho?\n\n### Assistant:\nBen.</s>\n\n"
    "### User:\nWhy?\n\n### Assistant:\n",
}


@pytest.mark.parametrize("name", NAMED)
def test_named_templates(make_tokenizer, name):
    """Catches: wording other than the published one, an EOS token at which no answer ends."""
    tokenizer = make_tokenizer(extra=TOKENS[name])
    said = use_chat_template(tokenizer, name)
    text = tokenizer.apply_chat_template(messages(CHAT), tokenize=False, add_generation_prompt=True)
    assert text == RENDERED[name]
    end = TOKENS[name][-1] if TOKENS[name] else "</s>"
    assert tokenizer.eos_token == end
    assert said.startswith(f"chat template {name!r}; answers end with {end!r}")
    assert ("in place of '</s>'" in said) == (end != "</s>")


def test_replacing_a_template_is_said(tokenizer):
    """Catches: an instruction-tuned model whose own template is replaced without a word."""
    assert "'plain' in place of the tokenizer's own; answers end with '</s>'" in use_chat_template(
        tokenizer, "plain"
    )


@pytest.mark.parametrize(
    ("name", "lacking"), [("chatml", "<|im_start|>, <|im_end|>"), ("llama3", "<|eot_id|>")]
)
def test_tokens_that_the_tokenizer_lacks(make_tokenizer, name, lacking):
    """Catches: a turn that ends in six tokens of text, which no server takes for an end."""
    tokenizer = make_tokenizer()
    with pytest.raises(InputError) as caught:
        use_chat_template(tokenizer, name)
    assert lacking in str(caught.value)
    assert "all tokens of plain; or name a Jinja file" in str(caught.value)
    assert tokenizer.chat_template is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
            "no question before turn 2|otherwise",
        ),
        ("{% if %}", "refuses it"),
        ("{% for m in messages %}[{{ m.content }}]{% endfor %}", "no token of its own"),
    ],
)
def test_a_file_that_cannot_be_used(make_tokenizer, tmp_path, text, reason):
    """Catches: a template of the user's own that fails at the first batch, or never ends an answer."""
    path = tmp_path / "own.jinja"
    path.write_text(text)
    tokenizer = make_tokenizer()
    with pytest.raises(
        InputError, match=rf"data\.chat_template '.*own\.jinja': .*({reason}|cannot be rendered)"
    ):
        use_chat_template(tokenizer, str(path))
    assert tokenizer.chat_template is None


def test_a_file(make_tokenizer, tmp_path):
    """Catches: a file read as a name, or its ending token not taken for EOS."""
    path = tmp_path / "own.jinja"
    path.write_text(
        "{% for m in messages %}<u>{{ m.content }}<e>{% endfor %}{% if add_generation_prompt %}<u>{% endif %}"
    )
    tokenizer = make_tokenizer(extra=("<u>", "<e>"))
    assert "in place of '</s>'" in use_chat_template(tokenizer, str(path))
    assert tokenizer.eos_token == "<e>"
    assert end_with_turns(tokenizer) is None


def test_no_such_name_or_file(make_tokenizer, tmp_path, monkeypatch):
    """Catches: a typo taken for a template, or answered without the names."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"llama4: no such file.*allowed: llama3, chatml, plain, or a file"):
        use_chat_template(make_tokenizer(), "llama4")


def test_a_saved_template_comes_back(make_tokenizer, tmp_path):
    """Catches: an adapter served with the base's template, or with an EOS token at which no answer ends."""
    tokenizer = make_tokenizer(extra=TOKENS["chatml"], pad_token="<pad>")
    use_chat_template(tokenizer, "chatml")
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    again = make_tokenizer(extra=TOKENS["chatml"], pad_token="<pad>")
    assert use_saved_template(again, tmp_path)
    for one in (loaded, again):
        assert (one.chat_template, one.eos_token) == (tokenizer.chat_template, "<|im_end|>")
    assert not use_saved_template(make_tokenizer(), tmp_path / "elsewhere")
