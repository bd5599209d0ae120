"""The judge: answers that are the same, answers that are not, hostile text, real responses with official verdicts."""
import json
import random
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from reward import format_reward
from utils import judge
from utils.answers import is_name
from utils.judge import _same, accepts, equivalent, extract_answer, is_correct

SHARED = Path(__file__).resolve().parents[2] / "shared"
ORACLE, CASES = SHARED / "data" / "judge_oracle", SHARED / "cases" / "judge" / "cases.jsonl"


def sample(answer, choices=None, **meta):
    return SimpleNamespace(id="q1", answer=answer, choices=choices, meta=meta)


# ---- equivalence

SAME = r"""
7 | 7.0                         ; .5 | 0.5                          ; -.5 | -1/2
1,234 | 1234                    ; 1,234,567 | 1234567               ; 1{,}234 | 1234
-3 | −3                         ; -8 | - 8                          ; **7** | 7
\frac{1}{2} | 0.5               ; \dfrac{1}{2} | 1/2                ; \frac12 | 0.5
\frac { 5 } { 12 } | 5/12       ; 2 1/2 | 2.5                       ; 2\frac{1}{2} | 5/2
-2 1/2 | -2.5                   ; 1/3 | 0.333                       ; 1/3 | 0.33
12.966 | 12.97                  ; 2\pi | 6.28                       ; \sqrt{2} | 1.41421356
50% | 0.5                       ; 50% | 50                          ; 50\% | 50 percent
33.33% | 1/3                    ; 12.5\% | \frac{1}{8}              ; \frac{1}{2}\% | 0.5%
5 cm | 5                        ; 5cm | 5 centimeters               ; 5\text{ cm} | 5 cm
45 \mathrm{~cm}^2 | 45 cm²      ; 60 Mbps | 60                      ; 36 watts | 36
7 feet per second | 7           ; 100 m/s | 100 m / s               ; 20√{2}海里 | 20\sqrt{2}
30^\circ | 30                   ; 30^{\circ} | 30 degrees           ; 30° | 30
$0.40 | 0.4                     ; \$5 | 5 dollars                   ; €5 | 5
1.5e3 | 1500                    ; 1.5 \times 10^3 | 1500            ; 2x10^{-3} | 0.002
2^{10} | 1024                   ; 2^3^2 | 512                       ; -2^2 | -4
6+4\sqrt{3} | $4\sqrt3 + 6$     ; \frac{3 \sqrt{6}}{2} | 3.674234614; \sqrt[3]{8} | 2
(\sqrt{2}-1)^{2} | 3-2\sqrt{2}  ; \frac{\pi}{2} | pi/2              ; \left(\frac{1}{2}\right)\pi | 0.5π
$\boxed{\frac{3}{4}}$ | 0.75    ; 8:5 | $8: 5$                      ; 1:4 | \frac{1}{4}
[1, 2] | 1,2                    ; [1, 2] | 1 and 2                  ; [0.5, 2] | 1/2, 2
1, 2 and 4 | 1,2,4              ; \{1,2\} | [1, 2]                  ; (3,-4) | (3, -4)
(u1, u2) = (0, 0) | (0, 0)      ; x = 5 | 5                         ; $x=5$ | 5
yes | Yes.                      ; true | True                       ; yes | True
no | No, there is none.         ; false | no!                       ; about 5 | 5
red circle | The Red  Circle.   ; o'clock | o’clock                 ; \text{blue} | blue
seven | 7                       ; twenty | 20                       ; seven circles | 7
B | (B)                         ; B | B.                            ; B | b
B | B) red circle               ; \textbf{(B)} | B                  ; Option B | (B)
½ | 0.5                         ; 2½ | 5/2                          ; ¾ cup | 0.75
5 × 10⁻³ | 0.005                ; 2² | 4                            ; 10⁻³ m | 0.001 m
5 Ω | 5 ohms                    ; 5\,\Omega | 5 ohm                 ; 5 kΩ | 5 kiloohms
3 mA | 3                        ; 3 mA | 3 milliamps                ; 5 μF | 5 µF
5\,\mu\text{F} | 5 microfarads ; 12 square units | 12              ; 12 units² | 12 square units
12 cm² | 12 cm^2                ; 12 square centimeters | 12 cm²    ; 5 sq. ft | 5 square feet
6' | 6 feet                     ; 6 ft | 6 feet                     ; 5" | 5 inches
7 feet per second | 7 ft/s      ; 25 degrees Celsius | 25°C         ; 5 KG | 5 kg
twenty-one | 21                 ; Ninety-Nine | 99                  ; thirty five cows | 35
hundred | 100                   ; a hundred | 100                   ; three hundred | 300
5 (five) | 5                    ; five (5) | 5                      ; 0.5 (or 50%) | 1/2
5 (5) | 25                      ; 3 \times 4 = 12 | 12              ; \frac{1}{6} \approx 0.167 | 1/6
\infty | ∞                      ; ∞ | infinity                      ; [0, \infty) | [0, ∞)
5 = x | 5                       ; 5 = x | x = 5                     ; x=3, y=4 | x = 3, y = 4
x=3, y=4 | 3, 4                 ; x=3, y=4 | (3, 4)                 ; 1/2 of the cake | 1/2
50% of the students | 50%       ; x' | x^{\prime}                   ; f' | f′
[1, 2] | 1, 2                   ; (1, 2) | 1, 2                     ; [1, 2, 3] | (1, 2, 3)
3:45 | 03:45                    ; 3:45 PM | 3:45                    ; 3:45 p.m. | 3:45 PM
8:5 | 16:10                     ; yes, 3 | yes                      ; Red Circle Aa | red circle aa
9^9^9 | 9^9^9                   ; 1e999999 | 1e999999               ; 5-4-3-2-1 | 5-4-3-2-1
10:45 \text{ AM} | 10:45 AM     ; 10:45\text{ AM} | 10:45          ; 10:45 \text{ PM} | 10:45 p.m.
one third | 1/3                 ; a half | 1/2                      ; half of the cake | 0.5
two-thirds | 2/3                ; a quarter | 0.25                  ; three quarters | 3
1.5 million | 1500000           ; $3 million | 3,000,000            ; 1.5 million | 1.5
1500 million | 1.5 Billion      ; 2 million people | 2,000,000      ; 1.1 million | 1100000
±3 | \pm 3                      ; x = \pm 3 | ±3                    ; 3 ± 1 | 3 \pm 1
seven (7) cubes taken | 7       ; 12 (twelve) eggs | 12             ; 3.14 (approximately) | 3.14
"""

DIFFERENT = r"""
1 | 12                          ; 7 | -7                            ; 0 | -0.5
1/60 | 1/55                     ; 2019 | 2020                       ; 1234567 | 1234568
0.3 | 1/3                       ; 0.33 | 0.34                       ; 0.02 | 1/60
0.00 | 0.001                    ; 1,234 | 1.234                     ; 2^10 | 210
5 cm | 5 m                      ; 5 cm | 6 cm                       ; 10% | 10 cm
50% | 5                         ; 50% | 0.5%                        ; 50% | 500
[1, 2] | [2, 1]                 ; [1, 2] | [1, 2, 3]                ; 1,2 | 12
(3,4) | (3,-4)                  ; 1:4 | 4:1                         ; 3 4 | 12
yes | no                        ; true | no                         ; no circles | no
red | blue                      ; red circle | red square           ; Y | yes
3x | 3                          ; 2a | 2                            ; 2ab | 2
3 or 4 | 3                      ; 2 or more | 2                     ; one of them | 1
5-4-3-2-1 | 5-2-3-4-1           ; 3-5 | -2                          ; 2019-05-03 | 2011
B | C                           ; (B) | (C)                         ; A | a red circle
\frac{1}{2} | \frac{1}{3}       ; \sqrt{2} | \sqrt{3}               ; 2\pi | 2
x=5 | x=6                       ; x=5 | y=5                         ; y=bx+c | y=ax+c
9^9^9 | 9^9^8                   ; 1e999999 | 1e999998               ; 1/0 | 0
AB' | A'B                       ; x' | x                            ; x'' | x'
Aa | AA                         ; Aa or AA | AA or Aa               ; pH | PH
5 mW | 5 MW                     ; 5 mA | 5 μA                       ; 5 kΩ | 5 Ω
(0,1) | [0,1]                   ; [0,1) | [0,1]                     ; (0, \infty) | [0, \infty)
1 2 | 12                        ; 1 2 | 1, 2                        ; no, 3 | no, 4
yes, 3 | no, 3                  ; 5 (six) | 5                       ; 5 (5) | 5
½ | 1/3                         ; 2½ | 1                            ; 2² | 22
12 cm² | 12 cm                  ; 12 cm² | 12 cm³                   ; 6' | 6 inches
twenty-one | 20                 ; hundred | 10                      ; ∞ | -∞
5 = x | 6                       ; 5 = x | 5 = y                     ; x=3, y=4 | 3, 5
x=3, y=4 | y=3, x=4             ; 1/2 of the cake | 1/3             ; 1/2 of 50 | 1/2
3:45 | 1:15                     ; 3:45 AM | 3:45 PM                 ; not 5 | 5
5! | 5                          ; 12:30 | 12.5                      ; one | two
2 and a half | 2                ; 5 plus some | 5                   ; 7 more | 7
10:45 \text{ AM} | 10:45 PM     ; 1 \text{ } 2 | 12                 ; 3.14 (approximately) | 3.15
third | 1/3                     ; one third | 1                     ; twenty third | 20/3
half a circle | 1/2             ; a half | 2                        ; one third | 1/4
1.5 million | 1.5 billion       ; 1.5 million | 1500                ; 1.5 million | 1500001
2 million people | 2000000 cars ; 5 thousandths | 5000              ; 1.57 million | 1566000
±3 | 3                          ; \pm 3 | 3                         ; 3 \pm 1 | 3
1e306 million | 1e307 million   ; fıve | 5                          ; one sıxth | 1/6
3 ± 1 | 3                       ; seven (8) cubes | 7               ; seven (8) cubes | 8
"""


def pairs(table):
    cells = [cell for line in table.strip().split("\n") for cell in line.split(";")]
    return [tuple(side.strip() for side in cell.split(" | ")) for cell in cells]


@pytest.mark.parametrize(("a", "b"), pairs(SAME))
def test_same(a, b):
    assert equivalent(a, b) and equivalent(b, a)


@pytest.mark.parametrize(("a", "b"), pairs(DIFFERENT))
def test_different(a, b):
    assert not equivalent(a, b) and not equivalent(b, a)


CHOICES = ["blue square", "red circle", "12 cm", r"$\frac{1}{2}$", "none of these"]


@pytest.mark.parametrize("answer", [
    "B", "(B)", "B.", "b", "(b)", "B) red circle", "B. red circle", "(B), red circle", "red circle", "Red Circle.",
    r"\text{(B)}", r"\textbf{B}", "Option B", "the red circle"])
def test_every_dress_of_an_option(answer):
    assert equivalent(answer, "B", CHOICES) and equivalent("B", answer, CHOICES)
    assert not equivalent(answer, "A", CHOICES) and not equivalent(answer, "D", CHOICES)


@pytest.mark.parametrize(("answer", "letter"), [("12", "C"), ("12.0 cm", "C"), ("0.5", "D"), ("1/2", "D")])
def test_an_option_by_its_value(answer, letter):
    assert [equivalent(answer, x, CHOICES) for x in "ABCDE"] == [x == letter for x in "ABCDE"]


@pytest.mark.parametrize("answer", ["F", "7", "green", "1", "", "circle", "5 cm"])
def test_what_names_no_option_equals_none(answer):
    assert not any(equivalent(answer, letter, CHOICES) for letter in "ABCDE")


@pytest.mark.parametrize("choices", [
    ["x", "x'"], ["yes, it does", "yes"], ["(0,1)", "[0,1]"], ["5 mW", "5 MW"], ["p", "P"], ["1 2", "12"], ["a_1", "a1"],
    ["the cat", "cat"], ['"a"', "a"], ["AB'", "A'B"], ["Aa", "AA"], ["Red", "red"], ["5", "5.0"], ["é", "É"], ["", "red"],
    ["", ""]])
def test_two_letters_are_two_answers_however_alike_the_options(choices):
    for a, b in (("A", "B"), ("(A)", "B"), ("A.", r"\text{B}")):
        assert not equivalent(a, b, choices) and not equivalent(b, a, choices) and equivalent(a, a, choices)
    for letter, option in zip("AB", choices):
        assert len(option) < 2 or equivalent(option, letter, choices)  # the very text names its own option ...
        assert len(option) < 2 or not equivalent(option, "BA"["AB".index(letter)], choices)  # ... and no other


def test_a_text_that_fits_several_options_names_none():
    assert [equivalent("RED", x, ["Red", "red", "blue"]) for x in "ABC"] == [False] * 3
    assert [equivalent("0, 1", x, ["(0,1)", "[0,1]"]) for x in "AB"] == [False] * 2
    assert [equivalent(r"\text{aa}", x, ["AA", "Aa", "aa"]) for x in "ABC"] == [False, False, True]


@pytest.mark.parametrize("choices", [[0, 1], (0, "1"), ["0", "1", ""], ["0", "é", "½"], [b"0", None, 2.5]])
def test_odd_options_are_no_error(choices):
    assert equivalent("A", str(choices[0]), choices) and not equivalent("A", "B", choices)
    assert extract_answer(f"The answer is {choices[0]}.", choices) == "A"
    for odd in (b"B", 0, [], {}, 1.5, float("nan"), "\ud800", ""):
        assert equivalent(odd, "B", choices) == equivalent("B", odd, choices)


def test_letters_against_options_that_look_like_letters():
    assert equivalent("(b)", "C", ["(c)", "(a)", "(b)"])  # an option's very text
    assert equivalent("B", "B", ["(c)", "(a)", "(b)"])
    shifted = ["A", "B", "C", "E", "none"]
    assert equivalent("E", "none", shifted) and not equivalent("E", "D", shifted)  # an upper-case letter is a position
    assert equivalent("C", "D", ["9", "12", "18", "18"])  # two options with one text cannot be told apart
    assert not equivalent("5", "A", ["5 cm", "5 m"]) and not equivalent("5", "B", ["5 cm", "5 m"])  # which 5?
    assert not equivalent("5", "5 cm", ["5 cm", "5 m"])


def test_none_equals_nothing_and_numbers_may_be_numbers():
    assert not equivalent(None, None) and not equivalent(None, "7")
    assert equivalent(7, "7") and equivalent("0.5", 0.5)


# ---- extraction

EXTRACTED = [
    (r"so \boxed{7}", "7"),
    (r"\boxed{1}, no: \boxed{2}.", "2"),
    (r"\boxed{\frac{1}{\sqrt{2}}} done", r"\frac{1}{\sqrt{2}}"),
    (r"first \boxed{1}, then \boxed{2", "1"),
    (r"$\boxed{\{1, 2\}}$", r"\{1, 2\}"),
    (r"The answer is 5. \boxed{6}", "6"),
    (r"Fill in \boxed{}. The answer is 5", "5"),
    ("The answer is 3.5.", "3.5"),
    ("The answer is 3. No, the answer is 4.", "4"),
    ("**Answer:** 7", "7"),
    ("ANSWER: **7**", "7"),
    ("The answer is:\n\n42\n", "42"),
    ("The final answer to the question is 2.", "2"),
    ("The answer is 24 because 13 + 11 = 24.", "24"),
    ("I count 7 circles.", "7 circles"),
    ("So there are 12 red circles in the image.", "12 red circles in the image"),
    ("The answer is that we can see 7 circles.", "7 circles"),
    ("The answer is 1, 2 and 4.", "1, 2 and 4"),
    ("The ratio is 8:5.", "8:5"),
    ("It is a red circle.", "a red circle"),
    ("Thus x = -3", "-3"),
    ("There are not 5 circles", None),
    ("We do not see 5 circles.", None),
    ("The missing number is 8, not 6.", "8"),
    ("The answer is 8 rather than 6.", "8"),
    ("Circles that are not red: 5", "5"),
    ("Since all sides are equal, it is a square.", "a square"),
    ("So **7** is the correct answer.", "7"),
    ("The clock shows **3:45**.", "3:45"),
    ("The statement is **false**.", "false"),
    ("**Final Answer**\n\n42", "42"),
    ("<answer> 5 cm </answer>", "5 cm"),
    ("The answer is: \\[\n\\frac{1}{2}\n\\]", r"\frac{1}{2}"),
    ("The total cost is **$12.50**.", "12.50"),
    ("No, there is no red circle here.", "No"),
    ("[1, 2]", "[1, 2]"),
    ("Answer：7", "7"),
    ("答案是7。", "7"),
    ("答案：7，因为有7个。", "7"),
    ("答案是否定的", "答案是否定的"),
    ('{"answer": "7"}', "7"),
    ('{"answer": "1, 2", "reason": "3 is not"}', "1, 2"),
    ("Thus Lily took 7 cubes out of the construction.", "7"),
    ("Thus Lily took **7** cubes out of the construction.", "7"),
    ("Thus Lily took 7 of 20 cubes", "20 cubes"),
    ("Thus Lily took 7 of 20 cubes out of the construction.", None),
    ("Thus Lily took 7 of twenty cubes out of the construction.", None),
    ("Thus Lily took some of 20 cubes out of the construction.", None),
    ("Lily did not take 7 cubes out of the construction.", None),
    ("Lily took more than 7 cubes out of the construction.", None),
    ("If Lily took 7 cubes out of the construction it stands.", None),
    ("Is it that Lily took 7 cubes out of the construction?", None),
    ("Lily took some of them out, since there were 7 cubes out of it before.", None),
    ("Please see figure 7 for the whole construction of it", None),
    ("Answer: 7 (since 20-13=7)", "7"),
    ("42 is the sum.", "42"),
    ("So **42** is the sum of 20 and 22.", "42"),
    ("42 is not the sum.", None),
    ("42 is the wrong sum.", "the wrong sum"),
    ("1 is the first digit and the last is 7", "7"),
    ("It would be 42, I believe.", "42"),
    (r"\fbox{7}", "7"),
    (r"So \fbox{7} it is, all things considered.", "7"),
    (r"\boxed{7} and \fbox{8}", "7"),
    ("The answer is 7. If we ignored one, the answer would be 6.", "7"),
    ("The answer is 7. The answer would be 6 if we ignored one.", "7"),
    ("The answer is 7, at first sight. So the answer would be 6.", "6"),
    ("The answer is not 7. The answer would be 6.", "6"),
    ("The answer is found by adding. The answer would be 24.", "24"),
    ("I cannot tell what this picture wants from me", None),
    ("", None),
    (" \n ", None),
]


@pytest.mark.parametrize(("text", "wanted"), EXTRACTED)
def test_extract(text, wanted):
    assert extract_answer(text) == wanted


@pytest.mark.parametrize(("text", "wanted"), [
    ("The answer is B.", "B"),
    ("answer: b", "B"),
    ("**Answer: B**", "B"),
    ("The answer is B because the circle is red.", "B"),
    (r"\boxed{\text{(B) red circle}}", "B"),
    (r"\boxed{red circle}", "B"),
    (r"\boxed{12}", "C"),
    (r"\boxed{150}", "150"),
    ("(A) is too small and (C) too large, hence (B).", "B"),
    ("Option B is right", "B"),
    ("So it's D.", "D"),
    ("The answer is A blue square", "A"),
    ("It must be a red circle.", "B"),
    ("It is either a red circle or a blue square.", None),
    ("A circle is red and a square is blue.", None),
    ("It measures 0.12 cm across the page.", None),
    ("A red circle. " + "Or so it seemed. " * 100, None),  # what was said long before the end is no answer
    ("I cannot tell.", None),
])
def test_extract_with_choices(text, wanted):
    assert extract_answer(text, CHOICES) == wanted


@pytest.mark.parametrize("text", [
    "The answer is B, because A is too dark.", "The answer is B, since (A) is too dark.", "The answer is (B), not (C)",
    "The answer is B rather than C.", "The answer is B; A is wrong.", "The answer is B. A is wrong.",
    "The colour that is not seen is (B).", "It is B", "The red point is C. So the colour is green.",
    "Therefore, B is correct.", "<answer>B</answer>", "<answer>\nB\n</answer>\nA was close.",
    "(B) green\n\nThe reason is that (A) is too dark.", "B\n\nExplanation: A is too dark",
    "**B**\n\nExplanation: (A) is too dark", "B. green\n\nIt is not (A).",
    "B\n\n" + "The picture is green, as (A) is not. " * 60, "The answer is not A, but B.", "The answer is B and not C",
    "Since (A) and (C) are too dark, it must be (B).", "Answer: B (not A)", "The answer is (B) green, not (A) red",
    "The answer is green, not red.", "The answer is B as A is too dark", "B is the correct answer.", "I choose B.",
    "B) the green one", "B - green", "The answer must be B.", "The best choice is B.", "Correct option: B", "## Answer\n\nB",
    "So the answer is: **B. green**", "**Answer:** B", "### Final answer\n\\[ \\boxed{\\text{B}} \\]", r"\boxed{(B) green}",
    "The correct answer is:\n\n**B) green**", "Option C is incorrect because it is blue. Option B is correct.",
    "Options:\n(A) red\n(B) green\n(C) blue\n\nGrass is (B).", "A. red\nB. green\nC. blue\n\nGrass is green.",
    "A. red – no, that is blood.\nB. green – yes.\n\nAnswer: B", "Final answer: **B**\n\nLet me know if you want more!",
    "The answer is **(B) green**, since grass is green (A and C do not fit).", "The colour of the middle one is B."])
def test_a_letter_is_kept_beside_others(text):
    assert extract_answer(text, ["red", "green", "blue"]) == "B"


@pytest.mark.parametrize("text", [
    "The answer is not B", "The answer isn't B", "The answer cannot be B.", "Neither A nor B", "A or B", "either A or B", "A/B",
    "A, B", "A and B only", r"\boxed{A, B}", r"\boxed{A or B}", r"\boxed{not B}", "The answer is (A) or (B).", "B is wrong.",
    "The answer is A or C", "It is either red or green.", "I can rule out B.", "Both A and B are correct.", "It is not green.",
    "It could be (A), (B) or (C).", "The colour is not (B).", "It is not green",
    "(A) red (B) green (C) blue", "(A) red\n(B) green\n(C) blue", "A. red\nB. green\nC. blue",
    "Options: A. red B. green C. blue"])
def test_what_decides_for_no_option_is_no_letter(text):
    choices = ["red", "green", "blue"]
    assert not any(equivalent(extract_answer(text, choices), letter, choices) for letter in "ABC")


@pytest.mark.parametrize(("text", "wanted"), [
    ("Answer：B", "B"), ("答案：B", "B"), ("正确答案是B，不是A。", "B"), ("选B", "B"), ("因此，选 B。", "B"), ("不选B", None),
    ("故选（B）。", "B"), ("选B还是C？", None), ("选 B 是错的", None), ("答案不是B", None), ("答案：B、C", None),
    ("选项B错误", None), ("It selects B or C.", None), ("36 minus 12 gives 24.", "B"), ("20 plus 16 minus 12 = **24**", "B"),
    ("Then we subtract, and 36 - 12 leaves $24$.", "B"), ("36 minus 12 does not give 24.", None),
    ("If 36 minus 12 gives 24", None), ("Is it so that 36 minus 12 gives 24?", None),
    ("Does it fit if the answer is A? No: the answer would be B.", "B"),
    ("It is either 12 or 24.", None), ("Of 36, 12 are red and 24 are blue", None),
    ("36 minus 12 gives 24, which is wrong.", None), ("36 minus 12 gives 24 and 12 gives 2.", None),
    ("36 and 12: there are 12 to 24 of them", None), ("12 of the 24 cubes", None),
    ("The answer is (B).\n\nNote: if we ignored hidden cubes, the answer would be A.", "B"),
    ("The answer is (B). Otherwise, the answer would be (A).", "B"), ("The answer would be B.", "B"),
    ("The answer is not A. The answer would be B.", "B"), ("The answer is A or C. Then the answer would be B.", "B"),
    ('{"answer": "B"}', "B"), ("{'answer': 'B', 'why': 'A is too small'}", "B"), ('{"answer": "B", "C": 1}', "B"),
    ('```json\n{\n  "reason": "A is too small",\n  "answer": "B. 24"\n}\n```', "B"), ('{"answer": 24}', "B"),
    ('{"answer": ["B", "C"]}', None), ('{"answer": "B or C"}', None), ('{"answer": "not B"}', None), ('{"answer": null}', None),
    ('{"answer": "", "B": 1}', None), (r"\fbox{B}", "B"), ("Answer: B (because 12 is too small)", "B")])
def test_extract_with_numeric_choices(text, wanted):
    assert extract_answer(text, ["12", "24", "36", "48"]) == wanted


@pytest.mark.parametrize(("text", "choices", "wanted"), [
    (r"The probability is \frac{1}{3}.", ["1/2", "1/3", "1/4"], "B"),
    (r"The probability is \frac{1}{5}.", ["1/2", "1/3", "1/4"], None),
    (r"The probability is not \frac{1}{3}.", ["1/2", "1/3", "1/4"], None),
    (r'{"answer": "\\frac{1}{3}"}', ["1/2", "1/3", "1/4"], "B"),
    ("A: \\frac12\nB: \\frac13\nC: \\frac14", ["1/2", "1/3", "1/4"], None),
    (r"The length is $\frac{28\pi}{3}$.", [r"$4 \pi$", r"$\frac{28}{3}\pi$"], "B"),
    ("The length is 12.", ["12 cm", "12 m"], None)])
def test_the_value_that_a_response_arrives_at_is_one_option(text, choices, wanted):
    assert extract_answer(text, choices) == wanted


def test_a_longer_option_is_not_also_a_shorter_one():
    assert extract_answer("It could be red or blue.", ["red", "blue", "red or blue"]) == "C"


@pytest.mark.parametrize("text", [None, 7, 0.5, ["B"], b"\\boxed{7}"])
def test_what_is_not_text_holds_no_answer(text):
    assert extract_answer(text) is None and extract_answer(text, CHOICES) is None


# ---- the kinds of utils/answers.py, one table each

SAME_KINDS = {
    "tiny numbers": r"""
1/2^{40} | 2^{-40} ;; 6.626 \times 10^{-34} | 6.626e-34 ;; 1.6e-19 C | 1.60 \times 10^{-19} C
2.5e-12 | 2.5 \cdot 10^{-12} ;; 10^{-20} | 1e-20 ;; 3.00e8 | 3 \times 10^8 ;; 5e-7 m | 5 \times 10^{-7} m
0.0000000025 | 2.5e-9""",
    "names and equations": r"""
4x + y = 3 | 3 = 4x + y ;; 2x - y + 1 = 0 | y = 2x + 1 ;; x = 11 | 11 ;; P(A) = 1/3 | 1/3 ;; f(2) = 7 | 7
\angle ABC = 40^\circ | 40 ;; \theta = 30 | 30 ;; x_1 = 4 | 4 ;; AB = 5 | 5 ;; x \approx 2.5 | 2.5
34x+45y-20z+100=0 | -34x-45y+20z-100=0 ;; x^2/4 + y^2/3 = 1 | x^2/16 + y^2/12 = 1/4
2x+4y-3=0 | y=-\frac{1}{2}x+\frac{3}{4} ;; total cost = 12 | 12 ;; |AB| = 5 | 5 ;; (x, y) = (1, 2) | (1, 2)
S = \{1, 2\} | \{2, 1\} ;; y = x/2 | \frac{x}{2} ;; k=\frac13 | k = 1/3 ;; \overline{AB} = 5 | 5
S_{ABC} = 12 | 12 ;; x = 1/3 \approx 0.33 | 1/3 ;; x = 5+5+1 = 11 | x = 11 ;; x = 11 | x = 5+5+1 = 11""",
    "intervals": r"""
(0.4,2.25] | (\frac{2}{5},\frac{9}{4}] ;; [0, 0.5) | [0, 1/2) ;; (-\infty, 3] | x \le 3
x \in (1, 2) | 1 < x < 2 ;; 5 > x \ge 2 | [2, 5) ;; x \in [-3,8] | [-3, 8] ;; [2,\infty) | x>=2
(-\infty, 1) \cup (2, \infty) | (2, ∞) ∪ (-∞, 1) ;; x<1 \text{ or } x>2 | (-\infty,1)\cup(2,\infty)
x \in \left(-\infty, -\frac{4}{3}\right) | x < -4/3 ;; ]0, 1[ | (0, 1)
(\frac{3}{5},\frac{8}{3}] | (0.6,2.6667] ;; x ∈ [0, 1] | 0 ≤ x ≤ 1 ;; (-\infty, +\infty) | (-∞, ∞)
0 \leqslant x < 5 | [0,5) ;; x \neq 2 | (-\infty, 2) \cup (2, \infty) ;; x \in \mathbb{R} | (-\infty, \infty)
x \in (-\infty, 2) \cup (2, \infty) | x \ne 2 ;; \mathbb R | (-∞, ∞)""",
    "sets": r"""
\{4, 1, 9\} | \{1, 4, 9\} ;; \{1, 2\} | {2, 1} ;; \left\{\frac12, 3\right\} | \{3, 0.5\}
3 or -4 | -4 or 3 ;; x=3 \text{ or } x=-4 | x = -4 or x = 3 ;; x = 3, x = -4 | -4, 3
x \in \{1, 2\} | \{2, 1\} ;; \{a, b\} | \{b, a\} ;; n = 5, m = 12 | m = 12, n = 5 ;; \pm 2 | 2, -2
x = \pm 3 | \{-3, 3\} ;; 1 \pm \sqrt{2} | 1-\sqrt2, 1+\sqrt2 ;; \{(1,2),(3,4)\} | \{(3,4),(1,2)\}
{1,3} | (1,3) ;; \{0.5, (1, 2)\} | \{(1,2), 1/2\} ;; x=1 and y=2 | y=2 and x=1""",
    "relations": r"""
7 \le x | x \geq 7 ;; x<3 | 3>x ;; x \neq 6 | x != 6 ;; 6 \ne x | x \neq 6 ;; 2x + y \le 6 | 6 \ge 2x + y
-x > -1 | x < 1 ;; -x >= -1 | x <= 1 ;; x \gt 5 | x > 5 ;; f(2) < f(1) < f(4) | f(4) > f(1) > f(2)
a \lt 0 | 0 > a ;; x > 0.5 | x > 1/2 ;; x ≥ \frac{3}{2} | 1.5 <= x""",
    "algebra": r"""
y/3 | \frac{y}{3} ;; x^2+4x+4 | 4 + 4x + x^2 ;; \sqrt{y} | sqrt(y) ;; 2-2p | -2p + 2 ;; (x+1)^2 | x^2+2x+1
\frac{x+2}{7} | \frac{x}{7}+\frac{2}{7} ;; 0.5x | x/2 ;; 3ab | 3ba ;; \frac{\pi r}{h+r} | \pi r/(h+r)
2\pi r | 2 r \pi ;; x(x+1) | x^2+x ;; \frac{1}{x} | x^{-1} ;; a^2-b^2 | (a-b)(a+b)
-\frac{x}{2} | \frac{-x}{2} ;; x^{1/2} | \sqrt{x} ;; \frac{3\sqrt{x}}{2} | 1.5\sqrt{x}
2\theta + 1 | 1 + 2\theta ;; n(n+1)/2 | \frac{n^2+n}{2} ;; x \cdot y | xy ;; a_1 + 2 | 2 + a_1""",
    "LaTeX and separators": r"""
\mbox{Tuesday} | Tuesday ;; \cfrac{2}{7} | 2/7 ;; 54,\!321 | 54321 ;; 54\,321 | 54321 ;; 41 pct | 41\%
28 percentage | 28% ;; 15\mbox{ cm}^2 | 15 cm^2 ;; 125\textnormal{ miles} | 125 ;; 7 500 | 7500
1 000 000 | 1000000 ;; 12 345 cm | 12345 cm ;; \frac3{3} | 1 ;; \sqrt 2+\sqrt 5 | \sqrt5+\sqrt2
5\,\text{cm} | 5 cm ;; \left( 3, \frac{\pi}{2} \right) | (3,\frac{\pi}{2})
\begin{pmatrix}1 & 0 \\ 0 & 1\end{pmatrix} | \begin{pmatrix} 1&0\\0&1 \end{pmatrix}
\big(\tfrac12\big) | 0.5 ;; \approx 5 | 5 ;; \langle 1, 2 \rangle | (1, 2) ;; \ln(2) | \ln 2 ;; 0.1\overline{6} | 1/6
\begin{bmatrix} 1 \\ 2 \end{bmatrix} | \begin{pmatrix} 1 \\ 2 \end{pmatrix} ;; \{ \} | \emptyset ;; 5^{\text{th}} | 5th
5th | 5 ;; \left.\frac12\right. | 1/2 ;; 5\,\text{N·m} | 5 N m ;; +\infty | \infty ;; \triangle DEF | △DEF""",
}

DIFFERENT_KINDS = {
    "tiny numbers": r"""
1/2^{98} | 1/2^{99} ;; 6.6 \times 10^{-34} | 1.4e-23 ;; 0 | 1e-15 ;; 1e-15 | -1e-15 ;; 10^{-20} | 10^{-21}
1e-13 | 2e-13 ;; 3.2e-19 C | 3.3e-19 C ;; 0 | 6.67e-11 ;; 2^{60} | 2^{60}+1 ;; 10^{20}+1 | 10^{20}
1e-300 | 0""",
    "names and equations": r"""
4x + y = 3 | 3 ;; x^2 + y^2 = 16 | 16 ;; 5 = 2a + b | 2a + b ;; a + 3z = 0 | 0 ;; 2x + z = 1 | 1
a^2 + b = 0 | 0 ;; 7 = 11a+c | 11a+c ;; 2x = 10 | 10 ;; x/y = 3 | 3 ;; 3x = 6 | 6 ;; x(x+1) = 6 | 6
a(b+c) = 10 | 10 ;; x = 3 | y = 3 ;; x + y = 3 | x - y = 3 ;; 2x + y = 3 | 2x + y = 4 ;; y = 2x | y = x/2
x^2 = 9 | 9 ;; -x = 4 | 4 ;; \sqrt{x} = 4 | 4 ;; \frac{x}{2} = 4 | 4 ;; 2x=10 | x=5 ;; |x| - 3 = 0 | 0
xy = 6 | 6""",
    "intervals": r"""
[0, 5) | [0, 5] ;; -3 < x \le 8 | [-3, 8] ;; x < 3 | y < 3 ;; x \in [0, 1] | y \in [0, 1] ;; (0, 1) | [0, 1]
x > 3 | 3 ;; x > 3 | x < 3 ;; (0, 3) | x < 3 ;; x \ge 2 | (2, \infty)
(-\infty, 1) \cup (2, \infty) | (-\infty, 1] \cup (2, \infty) ;; [0, 5) | 0, 5 ;; [0, 5) | [0, 6)
(0, 1) \cup (2, 3) | (0, 1) ;; x<1 or x>2 | 1<x<2 ;; x \in [-3, 8] | -3, 8 ;; -[0,1) | 1 ;; [0,9) | [0,1)
x \neq 2 | (-\infty, 2] \cup (2, \infty) ;; x \neq 2 | (-\infty, 3) \cup (3, \infty) ;; \mathbb{R}^2 | \mathbb{R} ;; \infty | -\infty""",
    "sets": r"""
\{4, 1, 9\} | \{1, 4\} ;; (4, 1, 9) | (1, 4, 9) ;; [1, 2] | [2, 1] ;; \{1, 2\} | \{1, 3\} ;; (3,1) | \{1,3\}
3 or -4 | 3 or 4 ;; 3 or -4 | 3 ;; x=3, y=4 | x=4, y=3 ;; x=3, y=4 | 4, 3 ;; x = 3 or y = -4 | -4 or 3
\{1, 1, 2\} | \{1, 2, 2\} ;; \{(1,2)\} | \{(2,1)\} ;; m = 12, n = 5 | 5, 12 ;; 1, 2, 3 | 3, 2, 1
\pm 2 | 2 ;; \pm 2 | 2, 2 ;; \pm 2 | 2, -3 ;; \{x=1, y=2\} | \{2, 1\}""",
    "relations": r"""
x<=3 | x<3 ;; x > 5 | x \ge 5 ;; x \neq 6 | 6 ;; x \neq 6 | x = 6 ;; x < 1 | x > -1 ;; x < 3 | x < 4
2x + y \le 6 | 2x + y < 6 ;; x > y | y > x ;; x \neq 6 | x \neq 5 ;; x > 3 | x = 3 ;; -x > 1 | x > -1
2x < 6 | x < 6 ;; red > blue | blue > red""",
    "algebra": r"""
\frac{ab}{c} | \frac{a}{bc} ;; \frac{1}{23} | \frac{12}{3} ;; \sqrt{2}x | \sqrt{2x} ;; e^{x}y | e^{xy}
\sin{x}y | \sin{xy} ;; \log_{2}3x | \log_{23}x ;; \binom{1}{23} | \binom{12}{3} ;; x_{1}2 | x_{12}
x^2+4x+4 | x^2+4x-4 ;; x/2 | 2/x ;; x/2 | y/2 ;; x + 2n + 1 | x + 1 ;; AB | BA ;; A-B-C | A-C-B
\sqrt{x^2} | x ;; \sin b \cos a | \sin a \cos b ;; 2x | x^2 ;; x2 | 2x ;; NO2 | 2NO
(a+5)(b+2) | (+5)(b+2) ;; 1/2x | \frac{x}{2} ;; x | x' ;; \frac{a}{b} | \frac{b}{a} ;; a - b | b - a
ab | a+b ;; x^2 | 2^x ;; A1-B2 | A-1B2 ;; abc | cab ;; 2ab | 2a ;; \log x | x \log ;; 2sin(x) | 2 sin x
x_1 + x_2 | x_1 + x_3 ;; 3x + c | 3x ;; A/B/C | A/C/B ;; a:b:c | a:c:b""",
    "LaTeX and separators": r"""
7 50 | 750 ;; 1 2 3 | 123 ;; 3\,4 | 34 ;; 41 pct | 41 cm ;; \cfrac{2}{7} | 7/2 ;; 12 34 | 1234
0 123 | 123 ;; 1 200/300 | 1200/300 ;; 100 200 | 100, 200 ;; \mbox{Tuesday} | Thursday ;; 41 pct | 14%
54,\!321 | 54 ;; \langle 1, 2 \rangle | (2, 1) ;; \ln(2) | \ln 3 ;; 0.\overline{3} | 0.3 ;; \overline{z} | z ;; 5^{th} | 6
\begin{vmatrix} 1 \\ 2 \end{vmatrix} | \begin{pmatrix} 1 \\ 2 \end{pmatrix} ;; \angle ABC | \triangle ABC ;; \approx 5 | 6 ;; x \approx 5 | y \approx 5""",
}


def kinds(tables):
    return [(kind, *cell.strip().split(" | ")) for kind, table in tables.items()
            for line in table.strip().split("\n") for cell in line.split(" ;; ")]


@pytest.mark.parametrize(("kind", "a", "b"), kinds(SAME_KINDS))
def test_a_kind_that_is_the_same(kind, a, b):
    """Accepted both ways round, and in a box, a sentence, or after a marker."""
    assert equivalent(a, b) and equivalent(b, a)
    for dress in (r"So \boxed{%s}.", "$%s$", "The answer is $%s$.", "The solution is $%s$", "%s"):
        if "matrix" not in a or "boxed" in dress:
            assert is_correct(dress % a.replace("%", r"\%"), sample(b)), dress


@pytest.mark.parametrize(("kind", "a", "b"), kinds(DIFFERENT_KINDS))
def test_a_kind_that_is_not_the_same(kind, a, b):
    assert not equivalent(a, b) and not equivalent(b, a)
    for text, gold in ((a, b), (b, a)):
        for dress in (r"So \boxed{%s}.", "The answer is $%s$.", "The line is $%s$."):
            accepted = is_correct(dress % text, sample(gold))
            # after "is", the 3 of "x = 3" is a value, whatever its name
            assert not accepted or (dress.startswith("The line") and is_name(text.replace("\\approx", "=").split("=")[0]))


def test_every_kind_has_eight_of_each():
    for tables in (SAME_KINDS, DIFFERENT_KINDS):
        for kind in SAME_KINDS:
            assert sum(row[0] == kind for row in kinds(tables)) >= 8, kind


# ---- the kinds of utils/judge.py: boxes, markers, revisions, letters, options, chat tokens, farewells

COLOURS, POWERS = ["red", "blue", "green", "yellow"], [str(2**i) for i in range(10)]
NAN, FLOAT_NAN = ["red", "blue", "nan", "nan"], ["red", "blue", float("nan"), float("nan")]
ONE, ONE_AND_NAN = ["red"], ["red", "nan", "nan", "nan"]
ANIMALS, TWELVE, ONLY = ["a cat", "a dog", "a bird", "none of these"], ["12", "nan"], ["only"]
RESPONSES = [  # text, options, gold, right?
    ("Answer: B\nOn reflection the third bar is higher:\n**C**", COLOURS, "C", True),
    ("The answer is A. But the left bar is taller, so **D**.", COLOURS, "D", True),
    ("\\boxed{A}\nBut it is taller.\n**D**", COLOURS, "D", True), ("Answer: A\n**Note**", COLOURS, "A", True),
    ("Answer: A\nIt is not **D**.", COLOURS, "A", True),
    ("The answer is A, rather than **D**.", COLOURS, "A", True),
    ("Answer: A\n**Explanation:** B is too small.", COLOURS, "A", True),
    ("First I said (A). Answer: A\n\n**(D)**", COLOURS, "D", True),
    ("Answer: A\n\n**D. yellow**", COLOURS, "D", True),
    ("Answer: A\nFinal answer: **B**", COLOURS, "B", True),
    ("Answer: B. Wait, no, it is (C).", COLOURS, "C", True),
    ("Answer: B. Actually, it is C.", COLOURS, "C", True), ("Answer: B. No, A is wrong.", COLOURS, "B", True),
    ("I would say it is C", POWERS, "C", True), ("I think the answer is I.", POWERS, "I", True),
    ("I", POWERS, "I", True), ("The answer is I", POWERS, "I", True),
    ("Answer: I believe it must be D.", POWERS, "D", True), ("Answer: I'd go with F", POWERS, "F", True),
    ("So the correct option is I.", POWERS, "I", True), ("My answer: I chose (J).", POWERS, "J", True),
    ("I am not sure.", POWERS, "I", False), ("Answer: I am not sure", POWERS, "I", False),
    ("I cannot tell", POWERS, "I", False), ("Answer: I do not know.", POWERS, "I", False),
    ("The answer, I think, is E.", POWERS, "E", True), ("Option I is correct.", POWERS, "I", True),
    ("I would choose B — it is wider.", COLOURS, "B", True),
    ("It is C – the widest one.", COLOURS, "C", True), ("I pick A -- the first one.", COLOURS, "A", True),
    ("The right one is D—it is the tallest", COLOURS, "D", True),
    ("It is not B — it is the tallest.", COLOURS, "B", False),
    ("It looks like B — but it is C.", COLOURS, "C", True), ("B — blue", COLOURS, "B", True),
    ("(B) — not (A)", COLOURS, "B", True), ("The answer is A.\nB would be too small.", COLOURS, "A", True),
    ("The answer is A.\nC and D are wrong.", COLOURS, "A", True),
    ("The answer is 48, in total, so many.", None, "48", True),
    ("The answer is 48, which is even.", None, "48", True),
    ("The answer is 48, as shown above.", None, "48", True), ("The answer is 12, in all.", None, "12", True),
    ("The answer is 1, 2, in this order", None, "1", False), ("The answer is 7, exactly.", None, "7", True),
    (r"Answer \( 23 \)", None, "23", True), ("Answer $ 9 $", None, "9", True),
    ("Answer $$ 9 $$", None, "9", True), (r"**Answer** \[ 5 \]", None, "5", True),
    (r"Final Answer \(x = 4\)", None, "4", True), ("Answer\n\\[\n\\frac{1}{2}\n\\]", None, "1/2", True),
    (r"Answer \( 17 \)", None, "16", False), ("Answer $ \n 9 \n $", None, "9", True),
    ("First \\boxed{128}, but I dropped a row.\n\nThe final answer is $416$", None, "416", True),
    (r"\boxed{5}. Wait, I missed one. The answer is 6.", None, "6", True),
    (r"\boxed{5}. The final answer is $5$. I hope it is correct.", None, "5", True),
    (r"\boxed{3\sqrt{13}}. The final answer is approximately 10.8", None, r"3\sqrt{13}", True),
    ("\\boxed{5}\n\nIf we ignored one, the answer would be 4.", None, "5", True),
    ("\\boxed{128}\nSo the final answer: 130", None, "128", False),
    ("\\boxed{B}\nThe final answer is C", COLOURS, "C", True),
    ("\\boxed{12}\nThe answer is reasonable because 12 is even.", None, "12", True),
    (r"\boxed{5}. If it were two, the answer is 10.", None, "5", True),
    ("Angle B.\nC.162 °", None, "162", True), ("D.45", None, "45", True), ("B.7 cm", None, "7", True),
    ("A.12", None, "13", False), ("The total is 36.<|im_end|>", None, "36", True),
    ("The total is 36.<|endoftext|>The total is 37.", None, "36", True),
    ("The total is 36.</s>", None, "36", True),
    ("36<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nThanks 5", None, "36", True),
    ("The total is 36.<end_of_turn>\n<start_of_turn>user\nok", None, "36", True),
    ("<|im_start|>assistant\nThe total is 36.<|im_end|>", None, "36", True),
    ("The answer is B.<|im_end|>\n<|im_start|>user\nIs it C?", COLOURS, "B", True),
    ("\\boxed{4}<|im_end|>\n<|im_start|>assistant\n\\boxed{5}", None, "5", False),
    ("The probability that Alice wins is 2/3. <|im_start|>user", None, "2/3", True),
    ("Answer: 9\n\nI hope this helps!", None, "9", True),
    ("Final Answer: The largest $n$ is 34.", None, "34", True),
    ("Final Answer: Jane started growing Sphere 3 hours ago. I hope it is correct.", None, "3", True),
    (r"\boxed{4} and \boxed{6}", None, "4, 6", True),
    (r"\boxed{4}, \boxed{6}, \boxed{9}", None, "4, 6, 9", True),
    (r"\boxed{4} or \boxed{6}", None, "6, 4", True),
    (r"$x = \boxed{3}$ and $y = \boxed{4}$", None, "x=3, y=4", True),
    (r"The area is \boxed{12} and the perimeter is \boxed{14}.", None, "12, 14", True),
    (r"$$\boxed{a = 1},\quad \boxed{b = 2}$$", None, "a=1, b=2", True),
    (r"\boxed{4} and \boxed{6}", None, "6", False), (r"\boxed{4} and \boxed{6}", None, "4", False),
    (r"\boxed{4}. Then \boxed{6}", None, "4, 6", False),
    (r"We get \boxed{4}.\nSo \boxed{6}", None, "6", True), (r"\boxed{4}, no: \boxed{6}", None, "6", True),
    (r"First \boxed{4}, then with the rest we find \boxed{6}", None, "6", True),
    (r"\boxed{A} and \boxed{B}", COLOURS, "B", False), (r"\boxed{7} and \boxed{7}", None, "7", False),
    (r"\boxed{12} $ and $ \boxed{13}", None, "12 and 13", True), ("The answer is nan", NAN, "C", False),
    ("nan", NAN, "D", False), ("The answer is B", NAN, "B", True), ("blue", FLOAT_NAN, "B", True),
    ("It is red.", ONE_AND_NAN, "A", True), ("C", NAN, "B", False), ("red", ONE, "A", True),
    ("The answer is A", ONE, "A", True), ("blue", ONE, "A", False), ("(A) red", ONE, "A", True),
    ("B", ONE, "A", False),
    ("Options: A: red, B: blue, C: green, D: yellow\nThe grass is green.", COLOURS, "C", True),
    ("A: red, B: blue, C: green, D: yellow", COLOURS, "D", False),
    ("A. red B. blue C. green D. yellow\nAnswer: B", COLOURS, "B", True),
    ("(A) red (B) blue (C) green (D) yellow. It is (B).", COLOURS, "B", True),
    ("A: red, B: blue, C: green, D: yellow", COLOURS, "A", False),
    ("The domain is $[0, 5)$.", None, "[0,5)", True),
    (r"Therefore $x \geq 5$ is the solution.", None, "x >= 5", True),
    ("Thus $x <= 2$ is our answer.", None, r"x \le 2", True),
    (r"We find that $x \neq 3$.", None, "x != 3", True), ("$x = 5+5+1 = 11$", None, "x=11", True),
    ("$x = 11$", None, "11", True), ("So x = 4.", None, "4", True),
    (r"So $5 \times 6 \times 4 = 120$.", None, "120", True),
    (r"The area is $\frac12 \cdot 6 \cdot 5 = 15$.", None, "15", True), ("It costs $5.", None, "5", True),
    ("So $a=2$ and $b=3$.", None, "a=2, b=3", True), ("The roots are $x=2$ or $x=3$.", None, "2, 3", True),
    ("The value of $x$ is 5.", None, "5", True), ("Let $x$ be it. Then $x$ is $5$ cm", None, "5", True),
    ("So $n=5$ gives $n^2 = 25$.", None, "5", False), ("The interval is $(2, 3]$.", None, "(2,3)", False),
    ("I would go with B — the others are too small.", ANIMALS, "B", True),
    ("Answer: I suspect it is B", POWERS, "B", True), ("I am certain: J", POWERS, "J", True),
    ("Answer: C\n\nHmm, but the tail is long. So it is:\n**A**", ANIMALS, "A", True),
    ("Answer: C\n\n**Answer: A**", ANIMALS, "A", True), ("The answer is (B).\n\n**B**", ANIMALS, "B", True),
    ("Answer: A\n**Why not B**", ANIMALS, "A", True), ("Answer: A\n**not B**", ANIMALS, "A", True),
    ("\\boxed{A}\nFinal answer: (C)", ANIMALS, "C", True),
    ("\\boxed{A}\nOption C is tempting but wrong.", ANIMALS, "A", True),
    ("\\boxed{24}\n\nThe final answer is 25.", None, "25", True),
    ("\\boxed{24}\n\nThe answer is 24 because 2 x 12.", None, "24", True),
    ("Answer: A\nB and C are too small.", ANIMALS, "A", True),
    ("Answer: A. However, D would be wrong.", ANIMALS, "A", True),
    ("The answer is A.\nWait, is it B? No.", ANIMALS, "A", True),
    ("The answer is 48, in total.", None, "49", False), ("The answer is 3, 4 and 5.", None, "3,4,5", True),
    ("The answer is 3, 4 and 5.", None, "3", False), ("The answer is (3, 4).", None, "(3,4)", True),
    (r"Answer $\frac{3}{4}$", None, "0.75", True), (r"My answer \(x\) was wrong; it is 5", None, "5", True),
    (r"x = \boxed{2} or x = \boxed{5}", None, "5 or 2", True),
    (r"\boxed{2} and \boxed{5}", None, "5, 2", False), (r"\boxed{\{2, 5\}}", None, "5, 2", True),
    (r"The range is $-1 \le y < 4$.", None, "[-1, 4)", True),
    (r"Hence $x \in (-\infty, 2)$.", None, "x < 2", True),
    (r"Thus the set is $\{1, 5\}$.", None, "{5, 1}", True),
    (r"The expression simplifies to $\frac{x}{4}$.", None, "x/4", True),
    (r"The area is $\frac{x^2}{4}$", None, "x^2/2", False), ("We get y = 3x + 2.", None, "y = 2 + 3x", True),
    ("We get y = 3x + 2.", None, "3x+2", True), ("So the line is y - 3x = 2.", None, "y = 3x + 2", True),
    ("So the line is y - 3x = 2.", None, "2", False), ("Answer: cat", ANIMALS, "A", True),
    ("It is nan.", TWELVE, "B", False), ("12", TWELVE, "A", True), ("A", ONLY, "A", True),
    ("The answer is only", ONLY, "A", True), ("maybe", ONLY, "A", False),
    ("A: a cat, B: a dog, C: a bird, D: none of these. I see a dog.", ANIMALS, "B", True),
    ("A) a cat B) a dog C) a bird D) none of these", ANIMALS, "A", False),
    ("The answer is 5.<|endoftext|><|endoftext|>", None, "5", True),
    ("<s>[INST] q [/INST] The answer is 5.</s>", None, "5", True),
    (r"\boxed{B}<|im_end|>", ANIMALS, "B", True), ("5<|end|>\n7", None, "5", True),
    (r"The mass is $9.1 \times 10^{-31}$ kg.", None, "9.1e-31", True),
    (r"The mass is $9.1 \times 10^{-31}$ kg.", None, "9.1e-30", False),
    ("It is about 0.", None, "1e-20", False), ("The total is 7 500.", None, "7500", True),
    ("The total is 41 pct.", None, "41%", True), (r"It is \mbox{blue}.", None, "blue", True),
    ("<|begin_of_box|>12<|end_of_box|>", None, "12", True), ("It is <|begin_of_box|>B<|end_of_box|>", COLOURS, "B", True),
    ("<|begin_of_box|>12<|end_of_box|>", None, "1", False), ('"B"', COLOURS, "B", True), ("B.blue", COLOURS, "B", True),
    ("B.green", COLOURS, "B", False), ("```\n12\n```", None, "12", True), ("The answer is not 7 but 8.", None, "8", True),
    ("The answer is not 7 but 8.", None, "7", False), ("The answer is 12 (confidence 90%)", None, "12", True),
    ("the answer is 3.14 m (rounded to two decimals)", None, "3.14", True), ("It is 5 o'clock", None, "5", True),
    ("Both B and C are plausible, however C is better.", COLOURS, "C", True),
    ("Is it 12?", None, "12", False), ("It is less than 12", None, "12", False), ("at least 12", None, "12", False),
    ("All except A", COLOURS, "A", False), ("A. No, B.", COLOURS, "B", True), ("A. No, B.", COLOURS, "A", False),
]


@pytest.mark.parametrize(("text", "choices", "gold", "right"), RESPONSES)
def test_a_response_is_read(text, choices, gold, right):
    assert is_correct(text, sample(gold, choices)) == right


@pytest.mark.skipif(not CASES.is_file(), reason="the reported misjudgements are not here")
def test_reported_misjudgements():
    rows = [json.loads(line) for line in CASES.read_text(encoding="utf-8").splitlines()]
    wrong = [row["id"] for row in rows
             if is_correct(row["response"], sample(row["gold"], row["choices"], **row["meta"])) != row["expected"]]
    assert len(rows) >= 49 and wrong == []


# ---- is_correct


def test_is_correct():
    assert is_correct(r"3 + 4 = \boxed{7}", sample("7"))
    assert not is_correct(r"3 + 4 = \boxed{17}", sample("7"))
    assert is_correct(r"\boxed{B}", sample("B", CHOICES)) and is_correct(r"\boxed{red circle}", sample("B", CHOICES))
    assert not is_correct(r"\boxed{blue square}", sample("B", CHOICES))
    assert is_correct("The answer is 3.43", sample(["24/7", "3.429"]))  # MMMU: any of several gold answers


@pytest.mark.parametrize(("text", "answer", "choices"), [
    ("Count them.\n\n1. Rows: 3\n2. Columns: 4\n\nTherefore, there are 3 × 4 = **12** tiles.", "B", ["10", "12", "15"]),
    ("Count them.\n\n1. Rows: 3\n2. Columns: 4\n\nTherefore, there are 3 × 4 = **12** tiles.", "12", None),
    ("The total is 10 + 2 = 12 cm.", "B", ["10 cm", "12 cm"]), (r"\boxed{\textbf{(B)}\ 12}", "B", ["10", "12"]),
    (r"\boxed{[1,2]}", "B", ["(1, 2)", "[1, 2]"]), ("The vertex is at (2, 1).", "B", ["(1, 2)", "(2, 1)"]),
    ("It cannot be determined from the picture.", "B", ["a square", "cannot be determined"]),
    ("It looks like a circle, but it is a square.", "B", ["a circle", "a square"]),
    ("The statement is not true, so it is False.", "B", ["True", "False"]), ("No, it is not.", "B", ["Yes", "No"]),
    ("The clock shows 3:45, so B is wrong.", "A", ["3:45", "4:45"]), ("There is a cat, not a dog.", "A", ["cat", "dog"]),
    ("The answer is A dog.", "B", ["cat", "dog"]), ("A cat is shown. The answer is therefore A.", "A", ["cat", "dog"]),
    ("Answer: b) 12 cm", "B", ["10 cm", "12 cm"]), ("Final Answer: The final answer is $\\boxed{7}$. I hope so.", "7", None),
    ("The shape is a square because all sides are equal.", "a square", None), ("There are 21 apples.", "twenty-one", None),
    ("The speed is 1.5 × 10⁻³ m/s.", "0.0015", None), (r"The resistance is $4\,\Omega$.", "4 ohms", None),
    ("The ratio of boys to girls is **3:4**.", "3:4", None), (r"\boxed{x \leq 3}", r"x \le 3", None),
    (r"The probability is $\frac16 \approx 0.167$.", "1/6", None), (r"The domain is $[0, \infty)$.", "[0, ∞)", None),
    ("**Answer: 5**\n\nLet me know if you would like a further explanation.", "5", None),
    ("There were seven (7) cubes taken.", "7", None), ("There are 12 (twelve) eggs.", "12", None),
    ("The cost is $3 million.", "3,000,000", None), ("The fraction is one third.", "1/3", None),
    ("The time is $10:45 \\text{ AM}$.", "10:45", None), ("It is 3.14 (approximately).", "3.14", None)])
def test_answers_in_the_manner_of_chat_models(text, answer, choices):
    assert is_correct(text, sample(answer, choices))
    assert not is_correct(text, sample("C" if choices else "8", choices))


def test_unanswered_is_wrong_and_a_missing_gold_answer_is_an_error():
    assert not any(is_correct(text, gold) for text in ("", None, "hm") for gold in (sample("7"), sample("A", CHOICES)))
    with pytest.raises(ValueError, match="'q1' has no gold answer"):
        is_correct(r"\boxed{7}", sample(None))


def test_mathvista_precision_rounds_both_sides():
    assert is_correct("28.34", sample("28.3", answer_type="float", precision=1))
    assert not is_correct("28.36", sample("28.3", answer_type="float", precision=1))
    assert not is_correct("28.34", sample("28.3")) and not is_correct("28.34", sample("28.3", precision=1))
    assert not is_correct("7.4", sample("7", answer_type="integer", precision=None))
    assert not is_correct("no number", sample("28.3", answer_type="float", precision=1))


@pytest.mark.parametrize("precision", ["nan", float("nan"), "abc", "inf", -1, 400, 10**400, "1e400", [], b"x"])
def test_a_precision_that_is_none_counts_as_absent(precision):
    assert is_correct("7", sample("7", answer_type="float", precision=precision))
    assert not is_correct("7.4", sample("7", answer_type="float", precision=precision))


def test_zero_and_empty_answers():
    assert is_correct(r"\boxed{0}", sample(0)) and accepts(0, sample("0.04", answer_type="float", precision=1))
    assert not any(is_correct(text, sample(gold)) for text in ("", "7") for gold in ("", [], [""]))


# ---- hostile text

N = 200_000
HOSTILE = {
    "open boxes": "\\boxed{" * (N // 7), "nested boxes": "\\boxed{" * (N // 8) + "x" + "}" * (N // 8),
    "box of digits": "\\boxed{" + "7" * N + "}", "box of spaces": "\\boxed{" + " " * N + "}",
    "spaces after box": "\\boxed" + " " * N, "digits": "7" * N, "open braces": "{" * N, "closed braces": "}" * N,
    "brackets": "(" * N, "spaces": " " * N, "lines": "\n" * N, "full stops": ". " * (N // 2), "minus signs": "-" * N,
    "answer is": "answer is " * (N // 10), "answer to": "answer to " * (N // 10), "answer, spaces": "answer" + " " * N,
    "letters": "(A) " * (N // 4), "dots after a letter": " A" + "." * N + "x", "powers": "9^" * (N // 2),
    "commas": "1," * (N // 2), "fractions": "\\frac{" * (N // 6), "backslashes": "\\" * N, "stars": "*" * N,
    "or": "A or " * (N // 5), "quotes": "red circle " * (N // 11), "asides": "since " * (N // 6), "names": "x=" * (N // 2),
    "echoes": "A blue square B " * (N // 16), "words": "twenty-" * (N // 7), "primes": "'" * N, "fraction signs": "½" * N,
    "would be": "answer would be " * (N // 16), "if": "if the answer would be " * (N // 23), "keys": '"answer": "' * (N // 11),
    "Chinese": "答案是" * (N // 3), "chosen": "选B " * (N // 4), "frames": "\\fbox{" * (N // 6),
    "thirds": "one third " * (N // 10),
    "said twice": "seven (7) " * (N // 10), "millions": "5 million " * (N // 10), "gives": "12 gives 24 " * (N // 12),
    "digits and a tail": "7" * N + "_x", "long clause": "answer: one of the many " + "7" * N + "_x",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_takes_linear_time(name):
    """200,000 characters: half a second or so on a slow machine, where one quadratic pattern takes minutes."""
    text = HOSTILE[name]
    start = time.process_time()
    for choices in (None, CHOICES):
        extract_answer(text, choices)
        is_correct(text, sample("A" if choices else "7", choices))
        equivalent(text, "7", choices)
        equivalent(text[:1000], text[:999] + "8", choices)
    format_reward(text, True)
    assert time.process_time() - start < 5


@pytest.mark.parametrize("answer", [
    "7" + " " * 990 + "x", "^" + " " * 990 + "x", "\\sqrt" + " " * 990, "and " * 250, ", " * 500, "(" * 1000,
    "7 (seven) " * 99, "million " * 120, "\\pm" * 330, "half of " * 120,
    "[" * 1000, "\\text{" * 160, "7," * 500, "x" + "=" * 990, "-" * 1000, "7.7" * 330])
def test_an_answer_of_a_thousand_characters_is_quick(answer):
    start = time.process_time()
    assert equivalent(answer, answer) and not equivalent(answer, "8") and not equivalent(answer, "A", CHOICES)
    assert time.process_time() - start < 1


@pytest.mark.parametrize("answer", [
    "9^9^9", "9^{9^{9^9}}", "9**9**9", "1e999999", "-1e999999", "10^{400}", "0^{-1}", "1/0", "(-8)^{0.5}", "\\sqrt{-1}",
    "1e308*1e308", "1e400-1e400", "\\frac{1}{0}", "5 -", "(", ")", "\\frac", "^", "((((7", "__import__('os')",
    "7;import os", "\x00", "१२", "½", "²", "\ud800"])
def test_odd_numbers_neither_hang_nor_raise(answer):
    assert equivalent(answer, answer)
    for other in ("7", "1e999999", "inf", "nan"):
        assert not equivalent(answer, other) or answer == other
    extract_answer(answer), extract_answer(answer, CHOICES), equivalent(answer, "A", CHOICES)


def test_random_text_never_raises_and_equivalence_is_symmetric():
    pieces = [*"0123456789.,()[]{}^+-*/ %$ABCabcx=:;!?°√π²\n", "\\frac", "\\sqrt", "\\boxed{", "answer is", " and "]
    rng = random.Random(0)
    for _ in range(300):
        a, b = ("".join(rng.choices(pieces, k=rng.randrange(12))) for _ in "ab")
        for choices in (None, CHOICES):
            assert equivalent(a, b, choices) == equivalent(b, a, choices), (a, b)
            extract_answer(a, choices)
        assert equivalent(a, a), a


FUZZ = [*"0123456789.,()[]{}^+-*/ %$ABCIabcxyz=:;!?°√π²<>≤≥≠∈∪±\n\"'_&|~#\\", r"\frac", r"\sqrt", r"\boxed{", "answer is",
        " and ", " or ", r"\{", r"\}", r"\le ", r"\in ", r"\cup ", r"\infty", r"\text{", r"\approx ", "}{", "**",
        "Final answer: ", "Wait, ", "not ", "because ", "seven ", "one third", "million", " cm", "<|im_end|>", r"\pm ",
        "\\\\", "1 234", "if ", "the answer would be ", "I hope it is correct. ", r"Answer \( ", "\ud800", "１", "选B",
        r"\quad", "1e9", "9^9", "I ", "nan", "0 < x < 7", "[0, 5)", "— "]


def test_fuzzed_text_is_quick_and_never_raises():
    """Short, long and repeated; each verdict is symmetric. Stops after 8 seconds."""
    rng, start, slow = random.Random(1), time.process_time(), []
    for _ in range(500):
        a, b = ("".join(rng.choices(FUZZ, k=rng.randrange(1, 9))) * rng.choice((1, 1, 3, 30, 300)) for _ in "ab")
        choices = rng.choice((None, CHOICES, POWERS, NAN, ONE))
        before = time.process_time()
        is_correct(a, sample("A" if choices else b, choices))
        same = equivalent(a, b, choices)
        slow.append(time.process_time() - before)
        assert same == equivalent(b, a, choices), (a, b)
        if before - start > 8:
            break
    assert len(slow) > 200 and sorted(slow)[-3] < .2  # of 100,000 none took .1 s on an idle machine


@pytest.mark.parametrize("nest", [
    "({})", "[{}]", r"\{{{}\}}", r"\frac{{{}}}{{2}}", r"\sqrt{{{}}}", "-{}", "2^{}", "f({})", "x = {}"])
def test_deep_nesting_is_bounded(nest):
    text = "x"
    while len(text) < 990 - len(nest):
        text = nest.format(text)
    start = time.process_time()
    assert equivalent(text, text) and not equivalent(text, "y") and not equivalent(text + "1", "y") and _same(text, text)
    assert time.process_time() - start < 1


# ---- the optional math-verify


@pytest.fixture(autouse=True)
def nothing_remembered():
    """Verdicts found with math-verify in one test do not serve another test that runs without it."""
    _same.cache_clear()


def test_math_verify_that_fails_is_not_an_error(monkeypatch):
    class TimeoutException(BaseException):
        pass

    def parse(*args, **kwargs):
        raise TimeoutException

    errors = SimpleNamespace(TimeoutException=TimeoutException)
    monkeypatch.setitem(sys.modules, "math_verify", SimpleNamespace(parse=parse, verify=parse, errors=errors))
    monkeypatch.setitem(sys.modules, "math_verify.errors", errors)
    monkeypatch.setattr(judge, "MATH_VERIFY", "0")
    assert not equivalent(r"\log_2 8", "3") and equivalent("x^2+1", "1+x^2")


def test_rules_alone_do_without_math_verify(monkeypatch):
    """The package changes no verdict unless it is switched on, and the switch says if it is missing."""
    monkeypatch.setitem(sys.modules, "math_verify", None)  # import raises ImportError
    assert equivalent(r"\frac{1}{2}", "0.5") and equivalent("x^2+1", "1+x^2") and not equivalent(r"\log_2 8", "3")
    with pytest.raises(ImportError, match="math-verify is not installed"):
        judge.use_math_verify()
    assert judge.MATH_VERIFY is None


def test_an_installed_math_verify_is_not_asked(monkeypatch):
    def parse(*args, **kwargs):
        raise AssertionError("asked")

    monkeypatch.setitem(sys.modules, "math_verify", SimpleNamespace(parse=parse, verify=parse))
    assert judge.MATH_VERIFY is None and not equivalent(r"\log_2 8", "3")


def test_math_verify_adds_algebra():
    pytest.importorskip("math_verify", reason="math-verify is not installed")
    assert judge.use_math_verify() == judge.MATH_VERIFY != ""
    try:
        assert equivalent("x^2+1", "1+x^2") and equivalent("(x+1)^2", "x^2+2x+1") and equivalent(r"\log_2 8", "3")
        assert not equivalent("x^2+1", "x^2-1") and not equivalent("2ab", "2") and not equivalent("9^9^9x", "x")
    finally:
        assert judge.use_math_verify(False) is None


# ---- real responses with the benchmarks' own verdicts

# (id, model): why the official verdict is wrong. Everything else counts.
OFFICIAL_ERRORS = {
    ("mathvision_319", "qwen-vl-max"): "boxed '1.8 m' is option E, the gold one; the unit defeats the official parser",
    ("mathvision_748", "gemini-pro-vision"): "boxed '45 cm^2' is option B, the gold one; the unit defeats it again",
    ("mathvista_653", "bard"): "a refusal, counted as 'Yes' because that option is the nearest in edit distance",
    ("validation_Electronics_21", "qwen_vl"): "1 against 0.9965: both are rounded to 2 decimals before comparing",
    ("validation_Manage_25", "qwen_vl"): "0.956 against 0.963: both are rounded to 2 decimals before comparing",
    ("validation_Mechanical_Engineering_9", "qwen_vl"): "cut off before an answer; the C of 'C = 10' is read as C",
}


def verdicts(name):
    """((id, model), our verdict, the official one) for each response whose official verdict is not a random guess."""
    path = ORACLE / f"{name}.jsonl"
    if not path.is_file():
        pytest.skip(f"the real responses are not here ({path}); this test checks against them")
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        choices = list((row.get("index2ans") or {}).values()) or row.get("choices") or None
        answer, text, meta = row["answer"], row["response"], {}
        if name == "mathvista":  # judged, as officially, from the answer that GPT-4 extracted; gold is an option's text
            text, meta = row["gpt_extraction"], {"answer_type": row["answer_type"], "precision": row["precision"]}
            answer = "ABCDEFGH"[choices.index(answer)] if choices else answer
        if row["official_correct"] is not None:
            yield (row["id"], row["model"]), is_correct(text, sample(answer, choices, **meta)), row["official_correct"]


@pytest.mark.parametrize(("name", "size"), [("mathvision", 204), ("mathvista", 204), ("mmmu", 177)])
def test_agreement_with_the_official_verdicts(name, size):
    rows = list(verdicts(name))
    assert len(rows) == size
    wrong = [key for key, ours, official in rows if ours != official]
    unexplained = [key for key in wrong if key not in OFFICIAL_ERRORS]
    counted = size - sum(key in OFFICIAL_ERRORS for key, _, _ in rows)
    assert 1 - len(unexplained) / counted >= 0.98, unexplained
    assert [key for key, _, _ in rows if key in OFFICIAL_ERRORS and key not in wrong] == []  # no stale excuses
