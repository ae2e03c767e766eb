"""Completions in a report: episodes as conversations, and tokens coloured by what the learner knew."""

import pytest
from test_report import CALL, LINE, example, heads, make_run, page, save_evaluation, save_tokenizer
from tiny import make_group

from gvpo_ray.observe.report import page as report
from gvpo_ray.observe.report.reading import read_run
from gvpo_ray.observe.report.tokens import coloured_of, token_texts
from gvpo_ray.observe.token_examples import write_examples


def episode(text, **columns):
    """A group of two: an episode of which the policy wrote what is between «», and a plain completion."""
    tokens = {token: i for i, token in enumerate(["<pad>", "<eos>", "«", "»", *sorted(set(text) - {*"«»"})])}
    ids, mask, is_trained = [], [], False
    for character in text:
        if character in "«»":
            is_trained = character == "«"
        else:
            ids.append(tokens[character])
            mask.append(is_trained)
    shown = {
        "completion_ids": [ids, [tokens[text[-2]]] * 2],
        "completions": [text.replace("«", "").replace("»", ""), "plain"],
        "sampling_logprobs": [[-0.5] * len(ids), [-0.5] * 2],
        "trained_tokens": [mask, None],
    }
    return tokens, make_group(1, rewards=(1.0, 0.0), **shown, **columns)


def shown_turns(got):
    """Kind and text of each block of completions."""
    kinds = [attributes["class"] for tag, attributes in got.tags if tag == "pre" and attributes.get("class")]
    return [kind for kind in kinds if kind != "config"]


@pytest.mark.parametrize("where", ["checkpoint", "model"])
def test_an_episode_is_a_conversation_of_what_is_trained_and_what_was_read(tmp_path, where):
    tokens, row = episode(f"«add them.{CALL}{CALL}»= 7 <b>ok</b>\n«so 7»")
    run = tmp_path / "run"
    save_tokenizer(tokens, run / "checkpoints" / "step-10" if where == "checkpoint" else tmp_path / "model")
    if where == "checkpoint":  # the newest, by its number
        save_tokenizer({"<pad>": 0}, run / "checkpoints" / "step-9")
    save_evaluation(run, "x-step-000010.arrow", row)
    got = page(run, [{"step": 10, "eval/x/pass@1": 0.5}], config=f"model: {{path: {tmp_path / 'model'}}}\n")
    assert shown_turns(got) == ["trained", "call", "call", "read", "trained", "completion"]
    texts = got.texts["pre"]
    start = texts.index("add them.")
    assert texts[start : start + 5] == ["add them.", CALL, CALL, "= 7 <b>ok</b>\n", "so 7"]
    notes = [text for text in got.texts["small"] if text.endswith("tokens")]
    num = len("add them.") + 2 * len(CALL)
    assert notes == [
        f"policy, trained: {num} tokens",
        "environment, read: 14 tokens",
        "policy, trained: 4 tokens",
    ]
    said = [text for _, text in heads(got)]
    assert f"{num + 4} of {num + 18} tokens trained" in said[0] and "tokens trained" not in said[1]


def test_without_a_tokenizer_an_episode_is_one_text_that_says_how_much_of_it_is_trained(tmp_path):
    _, row = episode("«a»bc«d»")
    save_evaluation(tmp_path, "x-step-000010.arrow", row)
    (tmp_path / "checkpoints" / "step-3").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-3" / "tokenizer.json").write_text("{torn")
    got = page(tmp_path, [{"step": 10, "eval/x/pass@1": 0.5}], config="model: {path: somebody/else}\n")
    assert shown_turns(got) == ["completion", "completion"] and "abcd" in got.texts["pre"]
    assert "2 of 4 tokens trained" in heads(got)[0][1]


def test_a_mask_that_does_not_fit_is_said_in_place_of_the_completions(tmp_path):
    _, row = episode("«a»bc«d»")
    save_evaluation(tmp_path, "x-step-000010.arrow", {**row, "trained_tokens": [[True], None]})
    got = page(tmp_path, [{"step": 10, "eval/x/pass@1": 0.5}])
    assert any("trained_tokens[0] has 1 entries, completion_ids[0] has 4" in text for text in got.texts["p"])


def shown_tokens(got):
    """Class, title and text of each token, of all completions."""
    found = [attributes for tag, attributes in got.tags if tag == "span" and "title" in attributes]
    texts = [text for text in got.texts["span"] if text.startswith("t:") or text in "▫["]
    return [(a["class"], a["title"], text) for a, text in zip(found, texts, strict=True)]


def test_the_tokens_of_a_completion_are_coloured_by_their_numbers_and_say_them(tmp_path):
    run = tmp_path / "run"
    save_tokenizer({"<pad>": 0, "t:a": 2, "t:b\n": 3, "t:<b>": 4, "t:d": 5}, run / "checkpoints" / "step-9")
    write_examples(run, 8, [example()])
    got = page(run, [{"step": 8, **LINE}])
    assert shown_tokens(got) == [
        # 2 nats and the largest push of the step: the deepest colours; 0.5 nats: the second; half of it: half
        ("sm4 pm4", "π 0.0821 · μ 0.607: −2 · push −0.004", "t:a"),
        ("sp2 pm2", "π 0.368 · μ 0.223: +0.5 · push −0.002", "t:b↵\n"),
        ("read", "the environment wrote it: read, not trained", "t:<b>"),
        ("", "π 0.905 · μ 0.905: 0 · push 0", "t:d"),
    ]
    assert (
        "less likely, pushed down: group 7, completion 2" in got.texts["b"] and "2 + 2?" in got.texts["pre"]
    )
    for line in (
        "−1.5 nats since versions 5 to 6 sampled it: importance π/μ 0.2231",
        "log-ratio to the reference −1.25 nats (mean of its group +0.5 nats)",
        "reward 0 (mean of its group 0.75)",
        "the update pushes it down: −0.002 per token",
    ):
        assert line in got.texts["small"]
    assert [attributes["id"] for tag, attributes in got.tags if attributes.get("type") == "radio"] == [
        "by-s",
        "by-r",
        "by-p",
    ]


def test_what_is_not_known_of_a_token_has_no_colour_and_a_long_completion_says_what_is_missing(tmp_path):
    many = {name: [-1.0] * 512 for name in ("policy", "reference", "push")}
    foreign = example(
        source="offline:<b>people", version_min=None, version_max=None, sampler=None, sampler_ratio=None,
        ids=[0] * 512, num_tokens=1512, **many,
    )  # fmt: skip
    write_examples(tmp_path, 4, [foreign])
    got = page(tmp_path, [{"step": 4, **LINE}])  # no tokenizer: ids are shown
    spans = [attributes for tag, attributes in got.tags if tag == "span" and "title" in attributes]
    assert {one["class"] for one in spans} == {"pm4"} and len(spans) == 512
    assert got.texts["span"].count("[0]") == 512 and " … 1000 tokens … " in got.texts["b"]
    assert "sampled by offline:<b>people, whose log-probs are not known" in got.texts["small"]


def test_the_first_a_middle_and_the_newest_step_are_shown_and_a_run_without_tokens_says_which_would_be(
    tmp_path,
):
    for step in (1, 2, 4, 8, 16, 30):
        write_examples(tmp_path, step, [example()] if step != 2 else [])
    (tmp_path / "tokens" / "step-000004.json").write_text("{edited")
    got = page(tmp_path, [{"step": 30, **LINE}])
    assert [text for text in got.texts["summary"] if text.startswith("step ")] == [
        "step 30",
        "step 8",
        "step 1",
    ]
    text = (
        page(tmp_path / "other", [{"step": 1, **LINE}]),
        (tmp_path / "other" / "report.html").read_text(),
    )[1]
    assert "None: the learner keeps them in steps 1, 2, 4, 8, …" in text


def test_the_texts_of_tokens_are_together_the_text_of_all_though_a_token_is_a_part_of_a_character():
    texts = {1: b"a", 2: b"\xe2", 3: b"\x82", 4: b"\xac", 5: b" b"}

    def decode(ids):
        return b"".join(texts[i] for i in ids).decode("utf-8", "replace")

    assert [*token_texts([1, 2, 3, 4, 5], decode)] == ["a", "▫", "▫", "€", " b"]
    assert [*token_texts([1, 2, 3], decode)] == ["a", "▫", "\ufffd"]  # cut off within a character
    assert [*token_texts([5, 1], None)] == ["[5]", "[1]"]


def test_many_tokens_leave_room_on_the_page_which_two_runs_share(tmp_path):
    def write(name, num_tokens):
        long = {each: [-0.123456] * num_tokens for each in ("policy", "sampler", "reference", "push")}
        ones = [example(completion=i, ids=[2] * num_tokens, num_tokens=9999, **long) for i in range(4)]
        for step in (1, 2, 4):
            write_examples(tmp_path / name, step, ones)
        return make_run(tmp_path / name, [{"step": 4, **LINE}])

    def steps(run_dir, num_runs):
        return [step for step, _ in coloured_of(read_run(run_dir, "run", 0), num_runs)]

    long, short = write("long", 512), write("short", 256)
    assert steps(long, 1) == steps(short, 2) == [4, 2, 1]  # 3 x 4 x 512 tokens, and half of them
    assert steps(long, 2) == [4]
    assert 5_000_000 < report.write(long).stat().st_size < 5_700_000  # curves of 10,000 steps take 0.2 MB
