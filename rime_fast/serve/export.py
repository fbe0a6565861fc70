"""One folder that stock transformers, sentence-transformers, vLLM and we read, with the same discriminative embeddings.

The layout is that of released multimodal embedding models: the whole checkpoint, sentence-transformers' module files,
and a second chat template whose prompt ends at ``<disc_emb>``. A causal model's state there, read by last-token
pooling and normalised, is ``d`` exactly. The template for generation is left as it is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rime_fast.data.templates import IM_END, IM_START, IMAGE, TEMPLATES, VIDEO, Template, get_template
from rime_fast.model.card import read_facts, write_card
from rime_fast.model.dual_mode import DualModeModel
from rime_fast.model.processor import RimeProcessor
from rime_fast.model.tokens import DISC_TOKEN, embedding_token_ids

CHAT_TEMPLATE = "additional_chat_templates/sentence_transformers.jinja"
_PROCESSORS = {"qwen2_vl": "Qwen2VLProcessor", "qwen2_5_vl": "Qwen2_5_VLProcessor", "qwen3_vl": "Qwen3VLProcessor"}
_CHAT = """
{%- set found = namespace(system=OWN, images='', videos='', text='') -%}
{%- for message in messages -%}
{%- if message['content'] is string -%}
{%- if message['role'] == 'system' -%}{%- set found.system = SYSTEM + message['content'] + END -%}
{%- else -%}{%- set found.text = found.text + message['content'] -%}{%- endif -%}
{%- else -%}
{%- for part in message['content'] -%}
{%- if message['role'] == 'system' -%}{%- set found.system = SYSTEM + part['text'] + END -%}
{%- elif part['type'] in ('image', 'image_url') -%}{%- set found.images = found.images + IMAGE -%}
{%- elif part['type'] in ('video', 'video_url') -%}{%- set found.videos = found.videos + VIDEO -%}
{%- else -%}{%- set found.text = found.text + part['text'] -%}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endfor -%}
{{- found.system + USER + found.images + found.videos + found.text + DISC -}}"""
_MODULES = (
    ("", "sentence_transformers.base.modules.transformer.Transformer"),
    ("1_Pooling", "sentence_transformers.sentence_transformer.modules.pooling.Pooling"),
    ("2_Normalize", "sentence_transformers.base.modules.normalize.Normalize"),
)


def export_model(
    model: str | Path,
    output_dir: str | Path,
    *,
    template: str | Template = "rewrite",
    dims: Sequence[int] | None = None,
    results: dict[str, float] | None = None,
) -> Path:
    """Write the folder for the model at ``model`` (directory or hub name; an adapter's is merged); returns it.

    template: the one it was trained with. dims: Matryoshka dimensions to announce; None: those of its configuration,
    if any. results: more figures for the model card. Raises ValueError for a tokenizer without the embedding tokens,
    for a template (given, or of the training) without ``<disc_emb>``, for dimensions outside 1 to the hidden size, and
    for an ``output_dir`` that is the model's own folder.
    """
    output = Path(output_dir)
    if Path(model).is_dir() and output.resolve() == Path(model).resolve():
        raise ValueError(f"output_dir is the model's own folder {output}; expected another one")
    facts = read_facts(model)
    template = get_template(template)
    for one in (template, TEMPLATES.get(facts.get("template", ""), template)):
        if not one.with_disc:
            raise ValueError(f"template is {one.name!r}, which trains no <disc_emb>: there is no mode disc to export")
    processor = RimeProcessor.from_pretrained(model)
    embedding_token_ids(processor.tokenizer)
    dual: Any = DualModeModel.from_pretrained(model)
    config = dual.config
    hidden = config.text_config.hidden_size
    dims = getattr(config, "matryoshka_dimensions", None) if dims is None else dims
    if dims:
        wrong = [size for size in dims if not 1 <= size <= hidden]
        if wrong:
            raise ValueError(f"dims has {wrong[0]}; expected 1 to {hidden}, the model's hidden size")
        config.is_matryoshka, config.matryoshka_dimensions = True, sorted(set(dims))
    dual.save_pretrained(output)
    processor.stock["processor_class"] = _PROCESSORS[config.model_type]
    processor.save_pretrained(output)
    (output / CHAT_TEMPLATE).parent.mkdir(exist_ok=True)
    (output / CHAT_TEMPLATE).write_text(chat_template(template), encoding="utf-8")
    for name, content in _sentence_transformers(hidden).items():
        (output / name).parent.mkdir(exist_ok=True)
        (output / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    facts = {"base_model": str(model), "template": template.name} | facts
    facts |= {"matryoshka_dimensions": getattr(config, "matryoshka_dimensions", None)}
    facts["results"] = facts.get("results", {}) | (results or {})
    write_card(output, facts, exported=True)
    return output


def chat_template(template: Template) -> str:
    """Write the prompt of ``template`` up to ``<disc_emb>`` as a Jinja chat template.

    System text (a system message's, else the template's), then one user turn: a placeholder for each image, then for
    each video, then the text. Every piece is an expression: a literal line end after a block tag would be trimmed.
    The loop over ``message['content']`` is written out, since vLLM looks for it to hand over parts, not one text.
    """
    own = "" if template.system is None else f"{IM_START}system\n{template.system}{IM_END}\n"
    words = {
        "OWN": own,
        "SYSTEM": f"{IM_START}system\n",
        "END": f"{IM_END}\n",
        "USER": f"{IM_START}user\n",
        "IMAGE": IMAGE,
        "VIDEO": VIDEO,
        "DISC": f"\n{DISC_TOKEN}",
    }
    return re.sub(r"\b[A-Z]+\b", lambda word: json.dumps(words[word.group()]), _CHAT).replace("\n", "")


def _sentence_transformers(hidden: int) -> dict[str, Any]:
    """sentence-transformers' files (their format of 6.x): name -> content."""
    forward = {"method": "forward", "method_output_name": "last_hidden_state"}
    return {
        "modules.json": [
            {"idx": i, "name": str(i), "path": path, "type": kind} for i, (path, kind) in enumerate(_MODULES)
        ],
        "sentence_bert_config.json": {
            "transformer_task": "feature-extraction",
            "modality_config": {
                **dict.fromkeys(("text", "image", "video"), forward),
                "message": forward | {"format": "structured"},
            },
            "module_output_name": "token_embeddings",
            "unpad_inputs": False,
            "processing_kwargs": {"chat_template": {"chat_template": "sentence_transformers"}},
            # PIL's resize, which the model was trained with: torchvision's differs by a step of 8 bits
            "processor_kwargs": {"use_fast": False},
        },
        "1_Pooling/config.json": {"embedding_dimension": hidden, "pooling_mode": "lasttoken", "include_prompt": True},
        "2_Normalize/config.json": {},
        "config_sentence_transformers.json": {
            "model_type": "SentenceTransformer",
            "prompts": {"query": "", "document": ""},
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
    }
