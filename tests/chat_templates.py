"""Chat templates in the forms that published models use, written anew: name -> (template, what is expected).

Expected is None where turn marks can say what the template says, else a word of the reason why they cannot. Together
they have turns that begin with special tokens and with text, BoS of their own, default system texts, dates, trimming at
one side and at both, system texts within the user's turn, other names of roles, and answers that begin with <think>.
"""

# What counts as a token in them. The second list are added tokens that are not special.
SPECIAL = """<|begin_of_text|> <|end_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|> <|im_start|> <|im_end|>
<s> </s> [INST] [/INST] <start_of_turn> <end_of_turn> <|endoftext|> <|start_of_role|> <|end_of_role|> <|user|>
<|assistant|> <|system|> <|end|> <|END_OF_TURN_TOKEN|> <|START_OF_TURN_TOKEN|> <|USER_TOKEN|> <|CHATBOT_TOKEN|>
<|SYSTEM_TOKEN|> <｜User｜> <｜Assistant｜> <｜end▁of▁sentence｜> <|end_of_turn|> <|im_user|> <|im_middle|>""".split()
PLAIN = ["<think>", "</think>", "<tool_call>"]

HEADER = "{% macro header(role) %}{{ '<|start_header_id|>' + role + '<|end_header_id|>\n\n' }}{% endmacro %}"
LLAMA = (
    HEADER
    + "{{ bos_token }}{% for m in messages %}{{ header(m.role) }}{{ m.content | trim }}<|eot_id|>{% endfor %}"
    + "{% if add_generation_prompt %}{{ header('assistant') }}{% endif %}"
)
LLAMA_DATED = (
    HEADER
    + "{{ bos_token }}{% if not date_string is defined %}{% set date_string = '26 Jul 2024' %}{% endif %}"
    + "{% if messages[0].role == 'system' %}{% set system = messages[0].content | trim %}"
    + "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
    + "{{ header('system') + 'Cutting Knowledge Date: December 2023\nToday Date: ' + date_string + '\n\n' }}"
    + "{{ system }}<|eot_id|>{% for m in messages %}{{ header(m.role) }}{{ m.content | trim }}<|eot_id|>{% endfor %}"
    + "{% if add_generation_prompt %}{{ header('assistant') }}{% endif %}"
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}{% endif %}"
)
CHATML_DEFAULT = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>{{ '\n' }}"
    "{% endif %}" + CHATML
)
TULU = (
    "{% for m in messages %}{% if m.role == 'system' %}<|system|>{{ '\n' + m.content + '\n' }}"
    "{% elif m.role == 'user' %}<|user|>{{ '\n' + m.content + '\n' }}{% elif not loop.last %}<|assistant|>"
    "{{ '\n' + m.content + eos_token + '\n' }}{% else %}<|assistant|>{{ '\n' + m.content + eos_token }}{% endif %}"
    "{% if loop.last and add_generation_prompt %}<|assistant|>{{ '\n' }}{% endif %}{% endfor %}"
)
DISTILLED = (
    "{% set ns = namespace(system='') %}{% for m in messages if m.role == 'system' %}{% set ns.system = m.content %}"
    "{% endfor %}{{ bos_token }}{{ ns.system }}{% for m in messages %}"
    "{% if m.role == 'user' %}<｜User｜>{{ m.content }}{% elif m.role == 'assistant' %}"
    "<｜Assistant｜>{{ m.content.split('</think>')[-1] }}<｜end▁of▁sentence｜>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<｜Assistant｜><think>\n{% endif %}"
)
BRACKETS = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set messages = messages[1:] %}"
    "{% endif %}{% for m in messages %}{% if loop.first and system is defined %}"
    "{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + m.content %}{% else %}{% set content = m.content %}"
    "{% endif %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('order') }}"
    "{% endif %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}<start_of_turn>model{{ '\n' }}{% endif %}"
)


def worded(user, assistant, between="\n", end="{{ eos_token }}", system="{{ m.content }}\n\n"):
    """A template whose marks are words."""
    return (
        "{% for m in messages %}{% if m.role == 'system' %}" + system + "{% elif m.role == 'user' %}"
        "{{ '"
        + user
        + "' + m.content + '"
        + between
        + "' }}{% else %}{{ '"
        + assistant
        + "' + m.content }}"
        + end
        + "{{ '"
        + between
        + "' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '" + assistant.rstrip(" ") + "' }}{% endif %}"
    )


TEMPLATES = {
    "llama-3": (LLAMA, None),
    "llama-3, untrimmed": (LLAMA.replace(" | trim", ""), None),
    "llama-3, left-trimmed users": (LLAMA.replace("m.content | trim", "m.content.lstrip()"), None),
    "llama-3, right-trimmed": (LLAMA.replace("m.content | trim", "m.content.rstrip()"), None),
    "llama-3, own default system": (
        LLAMA.replace(
            "{% for m",
            "{% if messages[0].role != 'system' %}{{ header('system') }}You are Saga.<|eot_id|>{% endif %}{% for m",
        ),
        None,
    ),
    "llama-3, written role by role": (
        "{% for m in messages %}{% if loop.first %}{{ '<|begin_of_text|>' }}{% endif %}{% if m.role == 'user' %}"
        "<|start_header_id|>user<|end_header_id|>{{ '\n\n' + m.content.strip() + '<|eot_id|>' }}"
        "{% elif m.role == 'system' %}<|start_header_id|>system<|end_header_id|>"
        "{{ '\n\n' + m.content.strip() + '<|eot_id|>' }}{% elif m.role == 'assistant' %}"
        "<|start_header_id|>assistant<|end_header_id|>{{ '\n\n' + m.content.strip() + '<|eot_id|>' }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
        None,
    ),
    "llama-3.1": (LLAMA_DATED, None),
    "llama-3.1, another date": (LLAMA_DATED.replace("26 Jul 2024", "26 July 2024"), None),
    "llama-3.1, untrimmed": (LLAMA_DATED.replace(" | trim", ""), None),
    "llama-3.1, another cut-off": (LLAMA_DATED.replace("December 2023", "March 2023"), None),
    "llama-3.2": (
        LLAMA_DATED.replace("'26 Jul 2024'", "strftime_now('%d %b %Y') if strftime_now is defined else '26 Jul 2024'"),
        None,
    ),
    "llama-3.1, no date of the user's": (LLAMA_DATED.replace("date_string", "a_string"), None),
    "llama-3.1, tools": (
        LLAMA_DATED.replace(
            "{{ system }}",
            "{% if tools is not none and tools is defined %}{{ tools | tojson(indent=4) }}{% endif %}{{ system }}",
        ),
        None,
    ),
    "chatml": (CHATML, None),
    "chatml, default system": (CHATML_DEFAULT, None),
    "chatml behind a BoS": ("{{ bos_token }}" + CHATML, None),
    "chatml, default system behind a BoS": ("{{ bos_token }}" + CHATML_DEFAULT, None),
    "chatml, trimmed": (CHATML.replace("m.content", "m.content | trim"), None),
    "chatml, generation tag": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        None,
    ),
    "chatml, thinking answers": (CHATML.replace("assistant{{ '\n' }}", "assistant{{ '\n<think>\n' }}"), None),
    "chatml, today's date": (
        "<|im_start|>system\nToday is {{ strftime_now('%Y-%m-%d') }}. {% if messages[0].role == 'system' %}"
        "{{ messages[0].content }}{% set messages = messages[1:] %}{% endif %}<|im_end|>{{ '\n' }}" + CHATML,
        None,
    ),
    "chatml, an empty system text is none": (
        "{% if messages[0].role == 'system' and not messages[0].content %}{% set messages = messages[1:] %}{% endif %}"
        + CHATML,
        None,
    ),
    "tulu": (TULU, None),
    "distilled reasoning": (DISTILLED, None),
    "square brackets": (BRACKETS, None),
    "square brackets, one BoS, no system": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}{% else %}{{ raise_exception('no') }}"
        "{% endif %}{% endfor %}",
        None,
    ),
    "angle brackets and </s>": (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content + eos_token }}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{{ '\n' }}{% endif %}",
        None,
    ),
    "an end where nobody answers": (
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
        None,
    ),
    "start of turn": (GEMMA, None),
    "roles in tokens": (
        "{% if messages[0].role != 'system' %}<|start_of_role|>system<|end_of_role|>You are of the north."
        "<|end_of_text|>{{ '\n' }}{% endif %}{% for m in messages %}<|start_of_role|>{{ m.role }}<|end_of_role|>"
        "{{ m.content }}<|end_of_text|>{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}<|start_of_role|>assistant<|end_of_role|>{% endif %}",
        None,
    ),
    "turn tokens": (
        "{{ bos_token }}{% for m in messages %}<|START_OF_TURN_TOKEN|>{% if m.role == 'system' %}<|SYSTEM_TOKEN|>"
        "{% elif m.role == 'user' %}<|USER_TOKEN|>{% else %}<|CHATBOT_TOKEN|>{% endif %}{{ m.content.strip() }}"
        "<|END_OF_TURN_TOKEN|>{% endfor %}"
        "{% if add_generation_prompt %}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>{% endif %}",
        None,
    ),
    "correct user": (
        "{{ bos_token }}{% for m in messages %}{{ 'GPT4 Correct ' + m.role.title() + ': ' + m.content "
        "+ '<|end_of_turn|>' }}{% endfor %}{% if add_generation_prompt %}GPT4 Correct Assistant:{% endif %}",
        None,
    ),
    "middle": (
        "{% for m in messages %}<|im_user|>{{ m.role }}<|im_middle|>{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_user|>assistant<|im_middle|>{% endif %}",
        None,
    ),
    "words": (worded("USER: ", "ASSISTANT:", " "), None),
    "instruction, response": (worded("### Instruction:\n", "### Response:\n", "\n\n"), None),
    "hashes, no end": (worded("### User:\n", "### Assistant:\n", "\n\n", end=""), None),
    "no marks at all": ("{% for m in messages %}{{ m.content }}{% endfor %}", None),
    "only the question": ("{{ messages[-1].content }}", "leaves out"),
    "questions are numbered": (
        "{% for m in messages %}<|im_start|>{{ loop.index }} {{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}",
        "conversation 3 ",
    ),
    "system text before the last question": (
        "{% for m in messages if m.role != 'system' %}{% if m.role == 'user' %}{{ '[INST] ' }}"
        "{% if loop.last and messages[0].role == 'system' %}{{ messages[0].content + '\n\n' }}{% endif %}"
        "{{ m.content + ' [/INST]' }}{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}",
        "conversation",
    ),
    "upper case": (CHATML.replace("m.content", "m.content | upper"), "leaves out"),
    "newlines stripped": (CHATML.replace("m.content", "m.content.strip('\n')"), "conversation 2 "),
    "first word only": (CHATML.replace("m.content", "m.content.split(' ')[0]"), ""),
    "said twice": (CHATML.replace("{{ m.content }}", "{{ m.content }} {{ m.content }}"), "repeats"),
    "a word is replaced": (CHATML.replace("m.content", "m.content.replace('Hi', 'Ho')"), "conversation 1 "),
    "empty answers left out": (
        CHATML.replace("{% for m in messages %}", "{% for m in messages if m.content %}"),
        "conversation",
    ),
    "long answers left out": (
        CHATML.replace("{% for m in messages %}", "{% for m in messages if m.content | length < 250 %}"),
        "conversation 19",
    ),
}
