"""Measure five hand-written tasks far from all that the bundled generator has seen: is what it returns at least as good as the base?

    python benchmarks/far_tasks.py [--generator cond-pdiff/minilm-text-tasks] [--num-adapters 20]

Each has eight examples a class (six where there are three classes) and twenty sentences to be told apart; none of it was ever trained,
fitted or selected on. Prints the accuracy of the base model with the same examples, of what the pipeline returns, and of the chosen
adapter whether or not it is returned.
"""

from __future__ import annotations

import argparse
import statistics

import torch

from cond_pdiff import CondPDiffPipeline, PrototypeClassifier, TaskPrompt

Rows = list[tuple[str, str]]


def rows(**classes: str) -> Rows:
    """Return (text, class name) for each line of each class; an underscore in a class's name is a space."""
    return [(line.strip(), name.replace("_", " ")) for name, lines in classes.items() for line in lines.strip().splitlines()]


TASKS: dict[str, tuple[Rows, Rows]] = {
    "Say whether a commit message fixes a bug, adds a feature, or tidies the code.": (
        rows(
            fix="""Stop the parser from crashing on empty input
                Off-by-one error in the pager
                Close the file handle when reading fails
                Handle a missing locale without a traceback
                Do not lose the last line of a log
                Wrong total when the cart holds a voucher""",
            feature="""Export reports as spreadsheets
                Let administrators lock an account
                Support dark mode in the settings page
                Search across archived mail
                Add a command that prints the schema
                Upload several pictures at once""",
            tidy="""Rename the helper to what it does
                Move constants into one module
                Remove an unused import
                Split the long function into three
                Format with the new line length
                Replace a loop by a comprehension""",
        ),
        rows(
            fix="""Prevent a deadlock when two workers stop together
                Dates before 1970 were shown as zero
                Escape quotes in the search field
                The counter no longer goes negative
                Retry did not happen after a timeout
                Null pointer on first login
                Correct the sign of the refund""",
            feature="""Allow sorting by price
                New endpoint for bulk deletion
                Offer login with a hardware key
                Show a preview before printing
                Users can now pin a conversation
                Introduce plugins for import formats
                Add Portuguese translation""",
            tidy="""Inline a variable that is read once
                Sort the list of dependencies
                Drop dead code after the migration
                Make names of tests consistent
                Extract the validation into a class
                Use type hints throughout""",
        ),
    ),
    "Decide whether a gardening tip is about watering or about pruning.": (
        rows(
            watering="""Soak the roots once a week rather than sprinkling daily
                In a heatwave a tub may need a can every evening
                Let the top inch dry out first
                A saucer that stays full rots the roots
                Rain collected in a butt suits azaleas
                Early morning is best so that leaves dry by noon
                Drip hoses save half of what a sprinkler wastes
                Seedlings like a fine rose on the can""",
            pruning="""Cut back to an outward facing bud
                Take out dead wood in late winter
                Shorten last year's shoots by a third
                Clean the blades between two trees
                Never remove more than a quarter of the crown
                Lavender is clipped right after it flowers
                Thin the middle so that light gets in
                A slanting cut sheds the rain""",
        ),
        rows(
            watering="""Give new hedges two buckets each in their first summer
                Yellow leaves often mean the pot is too wet
                Mulch keeps moisture in the bed
                Orchids are dunked and left to drain
                Stop in autumn when growth ends
                Use tepid, never icy, from the tap
                A finger in the soil tells more than a calendar
                Tomatoes split after a flood that follows drought
                Cacti get by on a sip a month
                Fill the tray and tip away the rest after ten minutes""",
            pruning="""Remove suckers where they leave the stock
                Saw heavy branches in three steps
                Roses are taken down to knee height in March
                Pinch out the tip to make it bushy
                Old canes of raspberries go to the ground
                Leave the collar and it will heal
                Trim box on a cloudy day
                Wisteria is spurred twice a year
                Crossing limbs should be taken away
                Deadhead so that more buds come""",
        ),
    ),
    "Entscheide, ob ein Satz über eine Ferienwohnung lobt oder klagt.": (
        rows(
            Lob="""Der Blick vom Balkon ist herrlich
                Sehr freundlicher Empfang mit Kuchen
                Alles war blitzsauber
                Die Kinder wollten gar nicht heim
                Bequeme Betten und absolute Ruhe
                Wir kommen nächstes Jahr wieder
                Besser ausgestattet als unsere Küche daheim
                Nur drei Minuten bis zum Strand""",
            Klage="""Im Bad roch es nach Schimmel
                Der Vermieter ging nie ans Telefon
                Die Heizung blieb kalt
                Auf den Fotos sah es doppelt so groß aus
                Nachts lärmte die Bar unter uns
                Das Sofa war durchgesessen und fleckig
                Für den Preis eine Frechheit
                Das Wasser in der Dusche wurde nie warm""",
        ),
        rows(
            Lob="""Liebevoll eingerichtet bis ins Detail
                Jeden Morgen hingen frische Brötchen an der Tür
                Man fühlt sich sofort wie zu Hause
                Großer Garten, in dem unser Hund toben durfte
                Tolle Tipps für Ausflüge bekommen
                Die Terrasse liegt bis abends in der Sonne
                Einfach rundum gelungen
                Schneller Internetzugang und ein ruhiger Arbeitsplatz
                Der Kamin machte die Abende gemütlich
                Unkomplizierte Übergabe, gern wieder""",
            Klage="""Überall lagen Haare vom Vorgänger
                Der Parkplatz war ständig belegt
                Die Fenster schlossen nicht richtig
                Kein einziges scharfes Messer in der Küche
                Wir haben am zweiten Tag abgebrochen
                Die Endreinigung kostete plötzlich das Doppelte
                Matratzen zum Davonlaufen
                Ameisen in jedem Schrank
                Auf unsere Beschwerde kam keine Antwort
                Der Fernseher ging die ganze Woche nicht""",
        ),
    ),
    "Does a line of a ship's log report calm or rough weather?": (
        rows(
            calm="""Sea like a mirror, sails hanging slack
                Light airs from the south all watch
                Crew mending nets on deck in the sun
                Not a ripple since dawn
                Made two knots under a clear sky
                Stars bright, swell barely felt
                Drifted with the tide, no wind
                Gentle breeze, washing hung to dry""",
            rough="""Took in the topsails as squalls came on
                Green water over the bow every minute
                Lost the jib in a gust
                Hatches battened, pumps manned
                Rolling so hard the cook was thrown
                Wind backing and rising to a gale
                Lifelines rigged, two men hurt
                Hove to until the worst had passed""",
        ),
        rows(
            calm="""Becalmed off the cape for a third day
                Boys swam around the hull at noon
                Smoke rose straight from the galley
                Fog lifted to a blue and quiet morning
                Painted the rails, the ship steady as a church
                Barely enough wind to steer by
                Dolphins in glassy water
                Captain read on deck until sunset
                Moonlight unbroken on the sea
                All hands idle for want of wind""",
            rough="""Mast sprung below the yard
                Waves broke the cabin windows
                Barometer falling fast and the sky black
                Cargo shifted in the night's tossing
                Ran before it under bare poles
                Helmsman lashed to the wheel
                Spray froze in the rigging
                Two boats stove in by a heavy sea
                Could not light the stove for the pitching
                Hail and thunder, reefed everything""",
        ),
    ),
    "Say whether a line of a recipe prepares, cooks, or serves.": (
        rows(
            prepare="""Chop the onions finely
                Weigh the flour into a bowl
                Leave the beans in water overnight
                Peel and core four apples
                Grease the tin with butter
                Beat the eggs with sugar""",
            cook="""Simmer for twenty minutes
                Roast at two hundred degrees until brown
                Fry the fish on both sides
                Bring to the boil, then turn the heat down
                Bake in the middle of the oven
                Steam the dumplings over water""",
            serve="""Sprinkle with parsley at the table
                Pour into warm glasses
                Arrange the slices on a plate
                Offer cream on the side
                Spoon over rice and enjoy
                Best with a glass of white wine""",
        ),
        rows(
            prepare="""Grate the cheese coarsely
                Rub the salt into the meat
                Sift cocoa and sugar together
                Cut the dough into strips
                Wash and spin the salad leaves
                Rest the batter for half an hour
                Stone the cherries""",
            cook="""Brown the butter in a small pan
                Grill for four minutes a side
                Reduce the sauce by half over a high flame
                Toast the nuts until they smell
                Poach the pears in red wine
                Sear the steak and let it sizzle
                Stew gently until it falls apart""",
            serve="""Garnish with a slice of lemon
                Ladle into deep bowls
                Dust with icing sugar just before the guests come
                Bring the pot straight to the table
                Add a scoop of ice cream to each portion
                Eat while it is hot""",
        ),
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generator", default="cond-pdiff/minilm-text-tasks")
    parser.add_argument("--num-adapters", type=int, default=20)
    arguments = parser.parse_args()
    pipe = CondPDiffPipeline.from_pretrained(arguments.generator)
    pipe.set_progress_bar_config(disable=True)
    found: list[tuple[float, float, float]] = []
    for description, (examples, asked) in TASKS.items():
        seeds = [torch.Generator().manual_seed(seed) for seed in range(arguments.num_adapters)]
        out = pipe(TaskPrompt(description, examples), num_adapters=arguments.num_adapters, generator=seeds)
        classifier = PrototypeClassifier(pipe.base_model(), out.report.labels, out.adapter, examples=examples)
        texts, right = zip(*asked, strict=True)
        accuracies = [
            statistics.fmean(a == b for a, b in zip(classifier.with_adapter(adapter).predict(texts), right, strict=True))
            for adapter in (None, out.adapter, out.adapters[out.chosen])
        ]
        found.append((accuracies[0], accuracies[1], accuracies[2]))
        print(description)
        print(f"  base {accuracies[0]:.0%}, returned {accuracies[1]:.0%}, chosen {accuracies[2]:.0%}; {out.report.choice.gain}", flush=True)
    base, returned, chosen = (statistics.fmean(column) for column in zip(*found, strict=True))
    print(f"mean of {len(found)}: base {base:.1%}, returned {returned:.1%}, the chosen adapter in any case {chosen:.1%}")


if __name__ == "__main__":
    main()
