"""How people ask: phrasings of every kind of request, a quarter of them held out of training by hash.

A phrasing is a template such as "Draw {}". Those of `DOCUMENTED` are what this project's own pages say, so they are
always trained on; of `MORE` a hash decides, fixed once and never tuned. `wording` fills one in and varies what
carries no meaning: a polite opening, the first capital, the full stop.
"""

from __future__ import annotations

import numpy as np

from anytoken.emoji_world import splits

HELD_OUT_SHARE = 0.25
DOCUMENTED_SHARE = 0.3  # of requests, besides those that fall on them by chance
DOCUMENTED: dict[str, tuple[str, ...]] = {
    "draw": ("Draw {}", "Show me {}", "Make a picture of {}"),
    "name": ("What is this?", "What do you see?", "Name it."),
    "describe": ("Describe this picture.", "Describe it."),
    "say": ("Say {}", "Say {} aloud", "Speak: {}"),
    "hear": ("What was said?", "Write down what you hear."),
    "animate": ("Animate {}", "Show {} moving"),
    "animate_this": ("Animate this.", "Make it move."),
    "watch": ("What moves here?", "What is this video?"),
    "draw_spoken": ("Draw this.", "Draw what was said."),
    "say_seen": ("Say what this is.", "Name it aloud."),
    "hear_and_draw": ("Write it down and draw it.",),
    "translate": ("Translate this gene.", "Which protein is this?"),
    "gene": ("Write a gene for {}", "DNA for {}"),
    "coding": ("Is this coding?",),
    "product": ("What does this gene make?",),
    "two": ("What are these?", "What are these two?"),
    "look_back": ("What was it?",),
    "recolour": ("Now on a {} background.",),
    "who": ("Who are you?", "Hello, who are you?"),
    "decline": ("What's the weather?",),
}
MORE: dict[str, tuple[str, ...]] = {
    "draw": (
        "Paint {}", "Sketch {}", "Create an image of {}", "Generate an image of {}", "Make an image of {}",
        "Give me a picture of {}", "I want a picture of {}", "I would like to see {}", "Let me see {}",
        "Produce a drawing of {}", "Make a drawing of {}", "I need an image showing {}",
        "A picture of {}, please", "Render {}", "Illustrate {}", "Design {}", "What does {} look like?",
        "How does {} look?", "Do you have a picture of {}?", "Imagine {} and draw it",
        "Create a picture with {}",
        "Draw me {}", "Doodle {}", "Make me an icon of {}", "An emoji of {}", "Please show a picture of {}",
        "Could I see {}?", "I'd love a drawing of {}", "Put {} on the canvas",
    ),
    "name": (
        "What's this?", "What is it?", "What is that?", "What animal is that?", "What is shown here?",
        "What does this picture show?", "Which thing is this?", "Tell me what this is.",
        "Can you tell what this is?",
        "Do you know what this is?", "What am I looking at?", "Identify this.", "Name this.",
        "Recognise this.",
        "What can you see in this image?", "Who or what is this?", "What's in this picture?",
        "What is in the image?",
        "Give me the name of this thing.", "What do we have here?", "What would you call this?",
        "Label this image.",
        "What object is this?", "What kind of thing is shown?", "What's depicted here?",
        "Guess what this is.",
        "What is this called?", "What's that?", "What's it called?", "What thing is that?",
        "Which animal is it?",
        "Which object do you see?", "Who is this?", "What might this be?", "What could this be?",
        "Recognise it.",
        "Identify the object.", "Identify the thing in this picture.", "Name the object.",
        "Name the thing shown.",
        "Name what you see.", "Write the name of this.", "Tell me the name of this.", "Tell me what it is.",
        "Tell me what's in this image.", "I wonder what this is.", "I want to know what this is.",
        "Any idea what this is?",
        "Can you identify this?", "Can you name this?", "Can you recognise this?", "Do you recognise it?",
        "What is pictured here?", "What is shown?", "What is depicted?", "What is being shown here?",
        "Image to text, please.",
    ),
    "describe": (
        "Write a caption for this.", "Caption this image.", "Describe the image.", "Describe what you see.",
        "Give a description of this picture.", "What does it look like?", "Tell me about this picture.",
        "Write down everything you see.", "How would you describe this?", "Describe this in words.",
        "What is it, in which style, on which background?", "Give me the full caption.",
    ),
    "say": (
        "Read this aloud: {}", "Read aloud: {}", "Read out {}", "Pronounce {}", "How do you pronounce {}?",
        "Speak the words {}",
        "Say the word {}", "Say this: {}", "Tell me {} in your voice", "I want to hear {}", "Let me hear {}",
        "Voice this: {}", "Record yourself saying {}", "Make a recording of {}", "Turn this into speech: {}",
        "Text to speech: {}", "Speak {} out loud", "Please say {} for me",
        "What does {} sound like when spoken?",
        "Utter {}", "Recite {}", "Give me audio of {}", "How is {} spoken?", "Narrate {}",
    ),
    "hear": (
        "What did they say?", "Transcribe this.", "Transcribe the recording.", "What is being said?",
        "Which words are these?", "Type what you hear.", "What do you hear?", "Put this into text.",
        "Speech to text, please.", "What does the voice say?", "Write this down.", "What word is this?",
        "Can you write down the words?", "What is the speaker saying?", "Tell me what was spoken.",
        "Take this down.",
    ),
    "animate": (
        "Make a video of {}", "Create a video of {}", "Generate a clip of {}", "Film {}",
        "Show me a video of {}",
        "I want to see {} move", "Make {} move", "Bring {} to life", "Show {} in motion",
        "Make an animation of {}",
        "Produce a short film of {}", "A video of {}", "A moving picture of {}", "Give me a clip with {}",
        "Let {} dance", "Can I watch {} moving?", "I'd like a video showing {}",
        "Make a gif of {}", "How does {} move?", "Play me a video of {}",
    ),
    "animate_this": (
        "Turn this into a video.", "Make a video of this.", "Make a video from this picture.",
        "Bring this to life.",
        "Let it move.", "Make this move.", "Animate this picture.", "Show it in motion.",
        "I want to see this move.",
        "Create an animation from this.", "Turn the image into a clip.", "Can you make this one move?",
        "Turn this picture into a video.", "Make a clip of this.", "Make an animation of this.",
        "Give me a video of this.",
        "Set this in motion.", "Show me how this moves.", "How does this move?", "Film this.",
        "Make a gif of this.",
        "Let this picture move.", "I want a video of this.", "Can you animate this?",
        "Image to video, please.",
        "Make it dance.", "Make this dance.", "Bring it to life.", "Bring this picture to life.",
        "Animate the image.",
        "Animate it.", "Put this in motion.", "Get this moving.", "Make the picture move.",
        "Make the image move.",
        "Make a moving version of this.", "Give me this as a video.", "Give me this as a clip.",
        "Show it moving.",
        "Show me this in motion.", "Show me this as a video.", "Turn it into a clip.",
        "Turn it into an animation.",
        "Turn the picture into an animation.", "Turn this still into a video.",
        "Create a clip from this image.",
        "Create a video of it.", "Generate a video from this image.", "Generate a clip of this.", "Film it.",
        "Make a short film of this.", "Make a short video from it.", "Produce a video of this.",
        "Convert this to video.",
        "I would like to see it move.", "I want it to move.", "I want an animation of this.",
        "Could this move?",
        "Can I see this move?", "Can you bring this to life?", "Could I have a video of this?", "Play this.",
        "What does this look like in motion?", "How would this look as a video?", "Picture to clip, please.",
    ),
    "watch": (
        "What is in this video?", "What do you see in the clip?", "What does the video show?",
        "What is moving?",
        "Name what moves.", "Tell me what you see in this video.", "Which thing is moving?",
        "What is this a video of?", "What's happening here?", "Who is moving in this clip?",
        "Identify what moves.",
    ),
    "draw_spoken": (
        "Draw what you hear.", "Draw what I said.", "Make a picture of what was said.",
        "Paint what you hear.",
        "Show me what was said.", "Turn this recording into a picture.", "Make an image of it.",
        "Listen and draw.", "Draw the thing that is named here.", "Picture what the voice says.",
        "Can you draw what I just said?",
        "Draw what the recording says.", "Draw what the voice says.", "Sketch what you hear.",
        "Sketch what was said.",
        "Show me what you hear.", "Show a picture of what was said.", "Make a drawing of what I said.",
        "Make a picture of what you hear.", "Create an image of what was said.",
        "Create a picture from this recording.",
        "Generate an image from this speech.", "Turn these words into an image.",
        "Turn speech into a picture.",
        "I want to see what was said.", "I want a picture of what you hear.", "Let me see what I said.",
        "Give me a picture of this.", "Give me an image of what is spoken.",
        "What does this look like? Draw it.",
        "Paint what the speaker says.", "Paint what I said.", "Illustrate this recording.",
        "Illustrate what was said.",
        "Draw the word that you hear.", "Draw the spoken word.",
        "Speech to image, please.",
        "Could I see what was said?", "Can you show me what I said?",
        "Put what you hear on the canvas.", "Draw me what this says.", "Hear this and show it as a picture.",
        "Draw it.", "Draw this word.", "Draw what was named.", "Draw a picture of what I said.",
        "Draw what is spoken.",
        "Paint this.", "Paint what was said.", "Sketch this.", "Sketch it.", "Show it to me.",
        "Show what you hear.",
        "Make an image of what I said.", "Make this recording a picture.",
        "Generate a picture of what was said.",
        "Create a drawing of what you hear.", "Illustrate it.", "Illustrate what you hear.",
        "Listen and paint.",
        "Turn what I said into an image.", "Turn my voice into a picture.", "Audio to image, please.",
        "Give me a drawing of what was said.", "I'd like to see what I said.",
    ),
    "say_seen": (
        "Tell me aloud what this is.", "Say the name of this.", "Say it.", "Speak its name.",
        "Pronounce what you see.",
        "Say aloud what you see.", "Read out what this shows.", "Name this with your voice.",
        "What is this? Answer aloud.", "Let me hear what this is called.", "Can you say what is shown?",
        "Say what you see.", "Say what is in the picture.", "Say what the image shows.",
        "Tell me what you see, aloud.",
        "Speak: what is this?", "Speak the name of this thing.", "Pronounce the name of this.",
        "Pronounce its name.",
        "Name this aloud.", "Name what you see aloud.", "Name it in your voice.", "Read the name aloud.",
        "I want to hear what this is.", "I want to hear its name.", "Let me hear its name.",
        "Let me hear what you see.",
        "How do you say this?", "How is this called? Say it.", "Use your voice: what is this?",
        "Answer by voice: what is it?",
        "Give me the name as speech.", "Image to speech, please.", "Turn this picture into speech.",
        "Make a recording that names this.", "Record what this is called.", "Describe it aloud.",
        "Please say the name of this.", "Could you say what this is?", "Can you name this aloud?",
        "Tell me with your voice what this is.", "Say out loud what this is.", "Speak up: what is shown?",
        "Say what it is called.", "Say which thing this is.", "Say what you can see here.",
        "Say in words what this is.",
        "Speak the name of what you see.", "Speak what you see.", "Speak about this picture.",
        "Voice what you see.",
        "Tell me out loud what you see.", "Tell me by voice what this shows.",
        "Let me hear what is in this picture.",
        "Let me hear the name of this.", "I'd like to hear what you see.", "I want audio of its name.",
        "Give me audio that names this.", "Give me a recording of its name.", "Read the picture to me.",
        "Pronounce what this is.", "Utter its name.", "Name the thing aloud.", "Name this picture out loud.",
        "Record the name of this.", "Record yourself naming this.", "Picture to speech, please.",
        "Answer with your voice: what do you see?", "Answer aloud: what is shown here?",
        "What is it? Say it.",
        "What do you see? Say it aloud.", "How does its name sound?", "How do you pronounce this?",
    ),
    "hear_and_draw": (
        "Transcribe it, then draw it.", "Write what you hear and make a picture of it.",
        "First the words, then a picture.",
        "Write down what was said and draw it.", "Transcribe this and paint it.",
        "Type what you hear and show it.",
        "Put this into text and draw it.", "Write it down, then make a picture.",
        "Give me the words and a drawing.",
        "Transcribe the recording, then illustrate it.", "Text first, then an image.",
        "Spell it and sketch it.",
        "Write it and draw it.", "Write this and paint it.", "Transcribe and draw this.",
        "Transcribe and illustrate.",
        "Write what was said, then sketch it.", "Write what you hear, then draw it.", "Type it and paint it.",
        "Put it into words and into a picture.", "Put down what was said and show a picture.",
        "Give me a transcript and an image.", "Give me the text and a picture of it.",
        "Words and picture, please.",
        "I want a transcript and a drawing.", "I need the words, and an image of them.",
        "Both text and image, please.",
        "Note what you hear and draw it.", "Note it down and illustrate it.",
        "Listen, write it down, and draw it.",
        "Show the words, then the picture.", "Tell me what was said in text and draw it.",
        "Spell the word and draw it.",
        "Say in writing what you hear, and draw it.", "Can I have the words and a picture?",
    ),
    "translate": (
        "Translate this DNA into protein.", "What protein does this encode?",
        "Which amino acids does this code for?",
        "Give me the amino acids.", "Read this gene.", "What is the protein sequence?",
        "Write down the residues.",
        "What does this sequence translate to?",
    ),
    "gene": (
        "Give me DNA that codes for {}", "Back-translate {}", "Which DNA makes {}?", "Encode {} as DNA",
        "Write DNA for the protein {}", "Design a gene for {}", "A DNA sequence for {}", "How is {} encoded?",
    ),
    "coding": (
        "Does this code for a protein?", "Is this part of a gene?", "Coding or not?",
        "Is this a coding sequence?",
        "Would you say this is coding?",
    ),
    "product": (
        "What is this gene's product?", "Which protein does this gene encode?",
        "What is the function of this gene?",
        "What is this gene for?", "Annotate this gene.", "Name the product of this gene.",
    ),
    "two": (
        "Name both.", "What are both of these?", "What do these two show?", "Tell me what they are.",
        "What are the two things?", "Name these two.", "Which things are these?", "What do you see in each?",
    ),
    "look_back": (
        "What did I show you?", "What was in the picture?", "And what was that?",
        "Tell me again what that was.",
        "What is it called?", "What did you just see?", "Remind me what this was.", "So what was shown?",
    ),
    "recolour": (
        "The same on {}, please.", "Make the background {}.", "Change the background to {}.", "Try it on {}.",
        "Put it on a {} background.", "I'd rather have it on {}.", "Can I have it on {}?",
    ),
    "who": (
        "What are you?", "What is your name?", "What can you do?", "Help", "How can you help me?",
        "Tell me about yourself.", "Are you a robot?", "Hello", "Hi there!", "Good morning",
        "Introduce yourself.",
        "What is this program?", "How do you work?", "Who made you?", "Are you ChatGPT?", "Hey, who is this?",
        "Good evening", "Good afternoon", "Greetings", "Hey there", "Hello there!", "Hi!", "Hey!",
        "Good day to you",
        "Nice to meet you", "What's your name?", "What should I call you?", "Do you have a name?",
        "And you are?",
        "Who am I talking to?", "Who is speaking?", "With whom am I chatting?",
        "Say something about yourself.",
        "Describe yourself.", "Present yourself, please.", "What sort of model are you?",
        "Which model is this?",
        "What kind of assistant are you?", "Are you a language model?", "Are you human?", "Are you a person?",
        "Are you an AI?", "Is this a chatbot?", "What are you able to do?", "What are you good at?",
        "What are your abilities?", "What do you know?", "What do you do?", "What is it that you do?",
        "What can I ask you?", "What can I do with you?", "What can I do here?", "What else can you do?",
        "What are you for?", "What were you made for?", "What is your purpose?", "What were you trained on?",
        "Which tasks can you do?", "Which things can you make?", "Give me an overview of what you can do.",
        "List your skills.", "How do I use you?", "How does this work?",
        "How should I talk to you?", "Where do I start?", "I need help", "Help me", "Can you help me?",
        "Explain yourself.", "Tell me what you are.", "Tell me who you are.", "What is this thing?",
        "Who built you?",
        "Who trained you?", "Where do you come from?", "Are you there?", "Is anybody there?", "Start", "Test",
    ),
    "decline": (
        "What's the weather like today?", "Will it rain tomorrow?", "What is the capital of {place}?",
        "How many people live in {place}?", "Who is the president of {place}?", "How do I get to {place}?",
        "What time is it?", "What time is it in {place}?", "What day is it today?", "What is {n} plus {m}?",
        "What is {n} times {m}?", "Solve this equation: {n} x = {m}", "Is {n} a prime number?",
        "Write a poem about {topic}.", "Tell me a joke about {topic}.", "Tell me a story about {topic}.",
        "Write an essay about {topic}.", "Explain {topic} to me.", "What is the meaning of {topic}?",
        "Summarise the history of {topic}.", "Who invented {topic}?", "What do you think about {topic}?",
        "Recommend a book about {topic}.", "How much does {topic} cost?", "Write code that sorts a list.",
        "Fix the bug in my Python program.", "How do I cook {food}?", "What is a good recipe for {food}?",
        "Is {food} healthy?", "Order {food} for me.", "Book a flight to {place}.",
        "Send an email to my boss.",
        "Call my mother.", "Set an alarm for {n} o'clock.", "Remind me to buy {food}.", "Play some music.",
        "Translate good night into French.", "How do you say {topic} in Spanish?", "What's in the news?",
        "Who won the game last night?", "Should I buy stocks?", "Why is the sky blue?",
        "How far away is the moon?",
        "When was the last war in {place}?", "How are you feeling today?", "Do you love me?",
        "Are you happy?",
        "What should I wear today?", "How old are you?", "What is your favourite colour?",
    ),
}  # fmt: skip
FILLERS = {
    "place": ("France", "Japan", "Berlin", "Brazil", "London", "Kenya", "Rome", "Canada", "Mars", "India"),
    "topic": (
        "love", "history", "gravity", "the sea", "football", "money", "quantum physics", "freedom", "music",
        "time",
    ),
    "food": ("pasta", "rice", "soup", "bread", "fish", "a cake", "potatoes", "pancakes"),
    "n": ("2", "3", "7", "12", "25", "100"),
    "m": ("4", "5", "9", "16", "31", "64"),
}  # fmt: skip
OPENINGS = (
    "Please ",
    "Can you ",
    "Could you ",
    "Would you ",
    "Hey, ",
    "Hi, please ",
    "Now ",
    "I'd like you to ",
)
ASKING = ("Can you ", "Could you ", "Would you ")
NOT_ORDERS = ("a ", "an ", "i ", "i'd ", "do ", "text ", "speech ", "first ", "dna ", "coding ", "and ", "so ",
              "the ", "let me", "now ", "hi", "hey", "hello", "good ", "help", "who", "what", "how")  # fmt: skip


def is_held_out(purpose: str, phrasing: str) -> bool:
    """Whether a phrasing is never used in training."""
    return (
        phrasing not in DOCUMENTED[purpose]
        and splits.fraction(purpose, phrasing, "phrasing") < HELD_OUT_SHARE
    )


def phrasings(purpose: str, held_out: bool = False) -> tuple[str, ...]:
    """The phrasings of a purpose that are trained on, or those that are not."""
    return tuple(
        one for one in (*DOCUMENTED[purpose], *MORE[purpose]) if is_held_out(purpose, one) == held_out
    )


def wording(
    rng: np.random.Generator, purpose: str, *values: str, held_out: bool = False, vary: bool = True
) -> str:
    """A request in words; where a purpose has no held-out phrasing, one that is trained on.

    vary: with an opening such as "Could you", a lower-case beginning or another ending, at times.
    """
    options = phrasings(purpose, held_out) or phrasings(purpose)
    if not held_out and rng.random() < DOCUMENTED_SHARE:
        options = DOCUMENTED[purpose]
    phrasing = options[int(rng.integers(len(options)))]
    filled = {name: words[int(rng.integers(len(words)))] for name, words in FILLERS.items()}
    text = phrasing.format(*values, **filled)
    return _vary(rng, text, order=_is_order(phrasing)) if vary else text


def _is_order(phrasing: str) -> bool:
    """Whether "please" and the like can stand before it: "Draw {}", but not "What is this?"."""
    return not phrasing.endswith("?") and not phrasing.lower().startswith(NOT_ORDERS)


def _vary(rng: np.random.Generator, text: str, order: bool) -> str:
    if order and rng.random() < 0.35:
        opening = OPENINGS[int(rng.integers(len(OPENINGS)))]
        text = opening + text[0].lower() + text[1:]
        if opening in ASKING:
            text = text.rstrip(".") + "?"
    chance = rng.random()
    if chance < 0.15:
        text = text[0].lower() + text[1:]
    elif chance < 0.3:
        text = text.rstrip(".?")
    elif chance < 0.4 and text[-1] not in ".?!":
        text += "."
    return text
