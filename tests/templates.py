"""Chat templates as odd as real ones, for the tests that hold prompts to vLLM's server."""

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PARTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% for part in m.content | selectattr('type', 'equalto', 'text') %}{{ part.text }}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The first message's parts are read without a loop: only what follows shows that there are any.
SYSTEM_FIRST_PART = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'][0]['text'] %}"
    "{% set rest = messages[1:] %}{% else %}{% set rest = messages %}{% endif %}"
    "<|im_start|>system\n{{ system }}<|im_end|>\n"
    "{% for m in rest %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}"
    "{% else %}{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MACRO = (
    "{% macro show(body, plain=false) %}{% if body is string %}{{ body }}{% else %}"
    "{% for item in body %}{{ item['text'] }}{% endfor %}{% endif %}{% endmacro %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ show(message.content) }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INTO_FIRST_USER = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}"
    "{% set first = messages[0].content + '\n\n' %}"
    "{% set loop_messages = messages[1:] %}{% else %}{% set first = '' %}"
    "{% set loop_messages = messages %}{% endif %}{% for m in loop_messages %}"
    "<|im_start|>{{ m.role }}\n{{ (first if loop.first else '') + m.content | trim }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_CONTENT = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n"
    "{% generation %}CONTENT<|im_end|>{% endgeneration %}{% else %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
STRIPS_THINKING = _CONTENT.replace("CONTENT", "{{ m.content.split('</think>')[-1] }}")
KEEPS_THINKING = _CONTENT.replace("CONTENT", "{{ m.content }}")
THINKING_OFF = CHATML.replace(
    "assistant\n{% endif %}",
    "assistant\n{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}",
)
DATED = (
    "{% if not date is defined %}{% set date = strftime_now('%d %b %Y') %}{% endif %}"
    "<|im_start|>system\nToday is {{ date }}.<|im_end|>\n" + CHATML
)
# As GPT-OSS's: channels, the date, and another token after an earlier answer than the target wrote.
HARMONY = (
    "<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.\n"
    "Knowledge cutoff: 2024-06\nCurrent date: {{ strftime_now('%Y-%m-%d') }}\n\n"
    "Reasoning: {{ reasoning_effort if reasoning_effort is defined else 'medium' }}\n\n"
    "# Valid channels: analysis, commentary, final. "
    "Channel must be included for every message.<|end|>"
    "{% if messages[0].role == 'system' %}<|start|>developer<|message|># Instructions\n\n"
    "{{ messages[0].content }}\n\n<|end|>{% set messages = messages[1:] %}{% endif %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "<|start|>assistant<|channel|>final<|message|>{{ m.content }}"
    "{{ '<|end|>' if add_generation_prompt or not loop.last else '<|return|>' }}"
    "{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)

TEMPLATES = {
    "chatml": (CHATML, None),
    "parts": (PARTS, None),
    "system's first part": (SYSTEM_FIRST_PART, None),
    "macro": (MACRO, None),
    "system into the first user": (INTO_FIRST_USER, None),
    "generation markers": (KEEPS_THINKING, None),
    "strips thinking": (STRIPS_THINKING, None),
    "thinking by default": (THINKING_OFF, None),
    "thinking off": (THINKING_OFF, {"enable_thinking": False}),
    "today": (DATED, None),
    "harmony": (HARMONY, {"reasoning_effort": "low"}),
    "a fixed date": (DATED, {"date": "26 Jul 2024"}),
    "no generation prompt": (CHATML.partition("{% if add")[0], None),
    "generation prompt always": (
        CHATML.partition("{% if add")[0] + "<|im_start|>assistant\n",
        None,
    ),
    "tools": (
        "{% if tools is not none and tools %}{{ tools | tojson }}{% endif %}"
        "{% if documents is not none %}{{ documents }}{% endif %}"
        "{% if tools is none %}-{% endif %}" + CHATML,
        None,
    ),
    "begins twice": ("{{ bos_token }}{{ bos_token }}" + CHATML, None),
    "trims": (CHATML.replace("m.content", "m.content | trim"), None),
    "escapes": (CHATML.replace("m.content", "m.content | tojson"), None),
    "capitals": (
        CHATML.replace("m.content", "m.content | upper if m.role == 'user' else m.content"),
        None,
    ),
    "loop controls": (
        CHATML.replace(
            "{{ m.content }}", "{% if not m.content %}{% continue %}{% endif %}"
        ).replace("<|im_end|>", "{{ m.content }}<|im_end|>"),
        None,
    ),
    "tags of the user's role": (
        "{% for m in messages %}{% if m['role'] == 'user' %}"
        "{{ '[INST] ' + m['content'] + ' [/INST]' }}"
        "{% elif m['role'] == 'system' %}{{ '<<SYS>>' + m['content'] + '<</SYS>>' }}"
        "{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}",
        None,
    ),
}
"""Template and its arguments, by what is odd about it."""


def _over(loop, before="", after=""):
    return f"{before}{{% for {loop} %}}{{{{ x }}}}{{% endfor %}}{after}"


_MESSAGES = "{% for m in messages %}", "{% endfor %}"
CONTENT_FORMATS = {
    "plain": (CHATML, False),
    "parts": (PARTS, True),
    "system's first part": (SYSTEM_FIRST_PART, True),
    "macro": (MACRO, True),
    "macro by keyword": (
        MACRO.replace("show(message.content)", "show(body=message.content)"),
        True,
    ),
    "macro that no message's content reaches": (
        MACRO.replace("show(message.content)", "show(message.role)"),
        False,
    ),
    "macro's parameter called content": (
        MACRO.replace("body", "content").replace("show(message.content)", "show(message.role)"),
        False,
    ),
    "item": (_over("x in m['content']", *_MESSAGES), True),
    "filtered and sliced": (_over("x in (m.content | list)[1:]", *_MESSAGES), True),
    "another key": (_over("x in m.tool_calls", *_MESSAGES), False),
    "a variable called content": (
        _over(
            "x in content", "{% for m in messages %}{% set content = m.content %}", "{% endfor %}"
        ),
        True,
    ),
    "a variable of another name": (
        _over("x in body", "{% for m in messages %}{% set body = m.content %}", "{% endfor %}"),
        False,
    ),
    "a list made of messages": (
        _over("x in m.content", "{% set rest = messages[1:] %}{% for m in rest %}", "{% endfor %}"),
        True,
    ),
    "a list made of that": (
        _over(
            "x in m.content",
            "{% set a = messages %}{% set b = a | list %}{% for m in b %}",
            "{% endfor %}",
        ),
        True,
    ),
    "messages assigned to itself": (
        _over(
            "x in m.content",
            "{% set messages = messages[1:] %}{% for m in messages %}",
            "{% endfor %}",
        ),
        True,
    ),
    "two targets of a loop": (
        _over("x, y in m.content", *_MESSAGES),
        False,
    ),
    "two targets of a loop over messages": (
        _over("x in m.content", "{% for m, n in messages %}", "{% endfor %}"),
        False,
    ),
    "a namespace's attribute": (
        _over(
            "x in m.content",
            "{% set ns = namespace() %}{% set ns.all = messages %}{% for m in messages %}",
            "{% endfor %}",
        ),
        False,
    ),
    "the first message only": (_over("x in messages[0].content"), False),
}
"""Template, and whether vLLM gives it parts, by what is odd about it."""
