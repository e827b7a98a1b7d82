"""The catalogue's script and the analysis of its words, as `check` sees them."""

import pytest

from rec_r1 import cli


@pytest.mark.slow  # the trainer's libraries take seconds to import
def test_check_warns_of_a_language_of_another_script(capsys, tiny_model, tmp_path):
    arguments = ["check", "quickstart", f"model.name={tiny_model}", "lora=null", "grpo.learning_rate=1.0e-6"]
    arguments.append(f"output_dir={tmp_path / 'run'}")  # the recipe's own may hold a run, of which check warns, too
    assert cli.main([*arguments, "retriever.params={language: ru}"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert "100% of the letters in the documents are Latin" in line and "language is ru" in line
    assert cli.main(arguments) == 0
    assert "warning" not in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("language", ["xx", "germn", "off"])
def test_an_unknown_language_ends_in_one_line(capsys, language):
    assert cli.main(["check", "quickstart", f"retriever.params={{language: {language}}}"]) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("rec-r1: ") and "retriever.params.language" in message
