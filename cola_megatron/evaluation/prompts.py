"""The published prompts: each task's template with its demonstrations (shots), as they were sent.

A template renders questions; demonstrations are questions whose answer is shown.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Question:
    """One question in the words of its dataset."""

    text: str
    answer: str
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class PromptTemplate:
    """How a task asks: `lead` text, options, `cue`; demonstrations before it, separated by an empty line."""

    lead: str = ""
    """What stands before the question's text, such as "Question: "."""
    options_heading: str = ""
    """A line before the options."""
    cue: str = ""
    """The last line, after which the model goes on."""
    preface: str = ""
    """What stands before everything."""
    demonstrations: tuple[Question, ...] = ()

    @property
    def shots(self) -> int:
        """How many answered questions precede the one that is asked."""
        return len(self.demonstrations)

    def render(self, question: Question) -> str:
        """The prompt of one question."""
        shown = [f"{self._ask(shot)} {shot.answer}\n\n" for shot in self.demonstrations]
        return "".join((self.preface, *shown, self._ask(question)))

    def _ask(self, question: Question) -> str:
        lines = [self.lead + question.text]
        if question.options:
            lines += [self.options_heading] if self.options_heading else []
            lines += lettered(question.options)
        return "\n".join([*lines, self.cue] if self.cue else lines)


def lettered(options: Sequence[str]) -> list[str]:
    """One line per option: "(A) first", "(B) second", ..."""
    return [f"({chr(ord('A') + index)}) {option}" for index, option in enumerate(options)]


LAMBADA = PromptTemplate()

MMLU = PromptTemplate(
    lead="Question: ",
    cue="Answer:",
    demonstrations=(
        Question(
            "Which gas do plants absorb from the air during photosynthesis?",
            "Carbon dioxide",
            ("Oxygen", "Carbon dioxide", "Nitrogen", "Hydrogen"),
        ),
        Question(
            "A triangle has angles 50 degrees and 60 degrees. What is the third angle?",
            "70 degrees",
            ("60 degrees", "70 degrees", "80 degrees", "90 degrees"),
        ),
    ),
)

OBQA = PromptTemplate(
    lead="Question: ",
    cue="Answer:",
    demonstrations=(
        Question(
            "Which tool is best for tightening a screw?",
            "screwdriver",
            ("spoon", "hammer", "screwdriver", "paintbrush"),
        ),
        Question(
            "What do plants absorb from the air during photosynthesis?",
            "carbon dioxide",
            ("carbon dioxide", "oxygen", "helium", "salt"),
        ),
    ),
)

HELLASWAG = PromptTemplate(
    lead="Context: ",
    cue="Answer:",
    demonstrations=(
        Question(
            "The girl puts the bread into the toaster and pushes the lever down. The bread",
            "starts to toast and turn brown.",
            (
                "becomes a slice of pizza.",
                "starts to toast and turn brown.",
                "disappears immediately.",
                "turns into a glass of water.",
            ),
        ),
        Question(
            "The goalkeeper sees the ball coming towards the net. He dives and",
            "catches the ball with his hands.",
            (
                "catches the ball with his hands.",
                "starts dancing in the field.",
                "opens a laptop to check email.",
                "runs away from the stadium.",
            ),
        ),
    ),
)

RACE = PromptTemplate(
    lead="Article: ",
    options_heading="Options:",
    cue="Answer:",
    preface="Read the following article and answer the question.\n\n",
    demonstrations=(
        Question(
            "Mary went to the store to buy some fruits. She bought five apples and two oranges. "
            "She paid 5 dollars in total. What did Mary buy?",
            "Apples and oranges",
            ("Bananas", "Apples and oranges", "Grapes", "Watermelon"),
        ),
    ),
)

SIQA = PromptTemplate(
    lead="Question: ",
    cue="Answer:",
    demonstrations=(
        Question(
            "Jordan wanted to tell a joke to his friends. What does Jordan need to do before this?",
            "think of a funny story",
            ("ignore his friends", "think of a funny story", "leave the room"),
        ),
        Question(
            "Kai helped his neighbor carry heavy groceries inside. How would the neighbor feel?",
            "grateful",
            ("angry", "grateful", "scared"),
        ),
    ),
)

SQUAD = PromptTemplate(
    lead="Context: ",
    cue="Answer:",
    demonstrations=(
        Question(
            "The Normans (Norman: Nourmands; French: Normands; Latin: Normanni) were the people who in the 10th and "
            "11th centuries gave their name to Normandy, a region in France. They were descended from Norse raiders "
            "and pirates from Denmark, Iceland and Norway.\nQuestion: In what country is Normandy located?",
            "France",
        ),
    ),
)

STORY_CLOZE = PromptTemplate(
    lead="Story: ",
    cue="End:",
    demonstrations=(
        Question(
            "I wanted to make an omelet. I cracked two eggs into a bowl and whisked them. "
            "Then I poured them into a hot pan.",
            "I ate a delicious omelet for breakfast.",
            ("I ate a delicious omelet for breakfast.", "I decided to order a pizza instead."),
        ),
        Question(
            "The runner tied his shoes tight. He sprinted as fast as he could during the race. "
            "He crossed the finish line first.",
            "He won the gold medal.",
            ("He was sad that he lost the race.", "He won the gold medal."),
        ),
    ),
)
