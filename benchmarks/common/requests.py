"""A dozen requests in real English, each with eight constraints and an answer, written for this project."""

from typing import Any

from datasets import Dataset

RESPONSE_TEMPLATE = "\n\nAnswer:"

# Request, constraints, answer.
_REQUESTS = [
    (
        "Explain to a new colleague how our lending library for tools works.",
        [
            "Mention that loans last two weeks.",
            "Use the word 'deposit' once.",
            "Write at most four sentences.",
            "Do not use exclamation marks.",
            "Address the reader directly.",
            "Name one tool that is often borrowed.",
            "End with the opening hours.",
            "Keep a friendly tone.",
        ],
        "You pick a tool from the shelf, write your name on its card and leave a small deposit. Loans last two weeks, and most "
        "people borrow the cordless drill. We are open on Tuesdays and Fridays from four to seven.",
    ),
    (
        "Describe the harbour of a small fishing town early in the morning.",
        [
            "Mention the smell of the sea.",
            "Use the present tense.",
            "Write a single paragraph.",
            "Include a sound.",
            "Do not mention any person by name.",
            "Compare the light to something.",
            "Stay below sixty words.",
            "End with a boat leaving.",
        ],
        "The quay is wet and smells of salt and diesel. Gulls quarrel over an empty crate while ropes creak against the posts. The "
        "light lies on the water like a thin sheet of tin, and one blue boat slips out past the breakwater.",
    ),
    (
        "Write a short message that cancels a dentist's appointment.",
        [
            "Apologise once.",
            "Ask for a new date next week.",
            "Do not give a reason.",
            "Use formal language.",
            "Begin with a greeting.",
            "Mention that mornings are best.",
            "Write no more than three sentences.",
            "Thank the reader at the end.",
        ],
        "Good afternoon, I am sorry to say that I cannot keep my appointment on Thursday. Would there be a free morning next week "
        "instead? Thank you very much for your help.",
    ),
    (
        "Recommend a vegetarian dish for a cold evening.",
        [
            "Name its main ingredient first.",
            "Say how long it takes to cook.",
            "Suggest a drink with it.",
            "Do not use onions.",
            "Write for a beginner.",
            "Use no numbers with digits.",
            "Keep it under fifty words.",
            "Mention a spice.",
        ],
        "Red lentils make a warming soup in about half an hour. Simmer them with carrots, tomatoes and a spoon of cumin until they "
        "fall apart, then add lemon juice. Serve it with toasted bread and a glass of hot apple juice.",
    ),
    (
        "Explain why the sky looks red at sunset.",
        [
            "Write for a child of eight.",
            "Use one comparison from daily life.",
            "Avoid the word 'scattering'.",
            "Write exactly three sentences.",
            "Mention the colour blue.",
            "Do not use brackets.",
            "Start with a question.",
            "Say what happens at noon.",
        ],
        "Have you ever watched a crowd walk through a long corridor until only the steady ones are left? At noon sunlight takes a "
        "short way through the air, and its blue part bounces into our eyes from everywhere. In the evening the way is so long that "
        "the blue is lost on the road and mostly red arrives.",
    ),
    (
        "Give advice to someone who wants to sleep better.",
        [
            "Give three pieces of advice.",
            "Do not mention medicine.",
            "Number each piece of advice.",
            "Mention the bedroom's temperature.",
            "Use imperatives.",
            "Do not write more than fifty words.",
            "Mention screens.",
            "Finish with an encouraging sentence.",
        ],
        "1. Go to bed at the same hour every day. 2. Keep the bedroom cool and dark. 3. Put all screens away an hour before you lie "
        "down. Give it two weeks, and you will notice the difference.",
    ),
    (
        "Write the opening of a detective story set on a train.",
        [
            "Use the first person.",
            "Let it rain outside.",
            "Mention a missing object.",
            "Do not reveal who did it.",
            "Use short sentences.",
            "Name the train's destination.",
            "Include one line of dialogue.",
            "Avoid adverbs.",
        ],
        'Rain ran down the windows of the night train to Vienna. I had the compartment to myself until the guard knocked. "Sir, the '
        'lady in number six has lost her violin," he said. I looked at the case on the rack above me. It was not mine.',
    ),
    (
        "Summarise the advantages of cycling to work.",
        [
            "Mention health and money.",
            "Use bullet points.",
            "Write at least three points.",
            "Keep each point under ten words.",
            "Mention one disadvantage too.",
            "Do not use the word 'environment'.",
            "Write for office workers.",
            "Close with a call to action.",
        ],
        "- Regular rides keep your heart in good shape.\n- You save the price of fuel and parking.\n- You arrive awake and skip the "
        "traffic.\n- Heavy rain remains a nuisance.\nTry it for one week and see how you feel.",
    ),
    (
        "Introduce yourself as the new teacher of a chess club.",
        [
            "Say how long you have played.",
            "Mention one favourite opening.",
            "Invite questions.",
            "Use a humorous remark.",
            "Write no more than five sentences.",
            "Do not mention your age.",
            "Mention the day of the meetings.",
            "Sign with the name Robin.",
        ],
        "Hello everyone, I have played chess for twenty years and still lose to my sister. My favourite opening is the Caro-Kann, "
        "which we will look at soon. We meet on Wednesdays after school, and every question is welcome. Robin",
    ),
    (
        "Tell a traveller how to reach the castle from the station.",
        [
            "Mention the river.",
            "Give the walking time.",
            "Use at most four steps.",
            "Warn about the stairs.",
            "Name one landmark on the way.",
            "Write in the imperative.",
            "Offer a bus as an alternative.",
            "Do not use abbreviations.",
        ],
        "Leave the station by the north exit and follow the river to the old mill. Cross the stone bridge and turn left at the "
        "bakery. Climb the stairs, which are steep and slippery after rain. The walk takes twenty minutes; the number nine bus stops "
        "at the gate.",
    ),
    (
        "Review a novel that you enjoyed this year.",
        [
            "Name the author.",
            "Do not reveal the ending.",
            "Give a rating out of ten.",
            "Mention one weakness.",
            "Use the past tense for the plot.",
            "Write at most sixty words.",
            "Recommend it to a certain kind of reader.",
            "Begin with the title.",
        ],
        "Middlemarch by George Eliot followed a doctor and a young idealist whose plans failed in a provincial town. The first "
        "chapters were slow, but every character was drawn with sympathy and wit. I would give it nine out of ten, and recommend it "
        "to patient readers.",
    ),
    (
        "Explain to a customer why the parcel arrives late.",
        [
            "Apologise for the delay.",
            "Blame nobody.",
            "Give a new date of delivery.",
            "Offer a discount.",
            "Write in a polite tone.",
            "Use no more than four sentences.",
            "Mention the order's number.",
            "Do not use the word 'unfortunately'.",
        ],
        "We are sorry that your order 4417 has been delayed. Heavy snow closed the motorway for two days, and the parcel will now "
        "arrive on Monday. Please accept ten percent off your next purchase. Thank you for your patience.",
    ),
]


def _said(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def multi_constraint_rows(constraints: int = 8) -> Dataset:
    """Chat rows with a prompt, the first `constraints` constraints and a completion, as Crab's adapter gives them."""
    rows = []
    for request, all_constraints, answer in _REQUESTS:
        completion = _said("assistant", answer)
        rows.append(
            {"prompt": _said("user", request), "constraints": all_constraints[:constraints], "completion": completion}
        )
    return Dataset.from_list(rows)


def one_constraint_contexts(contexts: int = 8, chat: bool = True) -> list[dict[str, Any]]:
    """Rows of contexts, each of them the request with one constraint; `prompt` has all of these constraints.

    Args:
        contexts: Number of contexts, at most 8.
        chat: Messages; otherwise text that ends in `RESPONSE_TEMPLATE`, for models without a chat template.
    """

    def prompt(*lines: str) -> Any:
        text = " ".join(lines)
        return _said("user", text) if chat else text + RESPONSE_TEMPLATE

    rows = []
    for request, constraints, answer in _REQUESTS:
        used = constraints[:contexts]
        rows.append(
            {
                "prompt": prompt(request, *used),
                "contexts": [prompt(request, constraint) for constraint in used],
                "completion": _said("assistant", answer) if chat else f" {answer}",
            }
        )
    return rows
