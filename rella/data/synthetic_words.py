"""The vocabulary of the data set `sample`: words that carry a genre, sequels, MovieLens-1M's profile values."""

from __future__ import annotations

_WORDS = {
    "Action": (
        "Explosive Lethal Furious Relentless Maximum Armed Blazing Extreme Deadly Unstoppable",
        "Commando Mercenary Ninja Firepower Chase Bodyguard Showdown Vigilante Stuntman Kickboxer Demolition Hijack",
    ),
    "Adventure": (
        "Lost Hidden Daring Forbidden Sunken Legendary Uncharted Golden Perilous Roaming",
        "Treasure Expedition Temple Pirate Jungle Explorer Caravan Voyage Idol Safari Cutlass Island",
    ),
    "Animation": (
        "Magical Fuzzy Tiny Bouncing Talking Cuddly Feathered Merry Painted Whiskered",
        "Puppy Fairy Duckling Teddy Kitten Unicorn Pixie Toyshop Bunny Mermaid Gingerbread Dragonfly",
    ),
    "Comedy": (
        "Goofy Clumsy Hilarious Wacky Silly Zany Clueless Nutty Awkward Dizzy",
        "Roommate Prank Vacation Slacker Goofball Sidekick Bachelor Hangover Clown Babysitter Neighbour Carpool",
    ),
    "Crime": (
        "Crooked Ruthless Hardboiled Corrupt Wanted Shady Guilty Laundered Streetwise Notorious",
        "Gangster Heist Detective Mobster Alibi Informant Godfather Racket Getaway Hitman Larceny Verdict",
    ),
    "Horror": (
        "Bloody Haunted Screaming Undead Cursed Ghastly Rotting Possessed Sinister Eerie",
        "Graveyard Werewolf Vampire Coffin Zombie Crypt Ghoul Asylum Banshee Exorcist Nightmare Cellar",
    ),
    "Romance": (
        "Tender Beloved Heartfelt Sweet Yearning Parisian Blushing Enchanted Wistful Forever",
        "Kiss Bride Valentine Sweetheart Wedding Embrace Honeymoon Letter Proposal Lover Rendezvous Courtship",
    ),
    "Sci-Fi": (
        "Galactic Robotic Atomic Alien Cosmic Orbital Quantum Cybernetic Stellar Lunar",
        "Android Starship Nebula Clone Wormhole Asteroid Colony Spaceman Planet Mutant Probe Reactor",
    ),
    "War": (
        "Fallen Valiant Armoured Besieged Wounded Patriotic Foxhole Bitter Enlisted Gallant",
        "Platoon Regiment Trench Sergeant Battalion Bomber Submarine Bridgehead Infantry Garrison Admiral Armistice",
    ),
    "Western": (
        "Dusty Lonesome Outlaw Rugged Frontier Prairie Sundown Wild Texan Saddled",
        "Gunslinger Sheriff Stagecoach Cowboy Rustler Saloon Canyon Posse Ranch Mustang Desperado Marshal",
    ),
}

WORDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    genre: (tuple(adjectives.split()), tuple(nouns.split())) for genre, (adjectives, nouns) in _WORDS.items()
}
"""By genre: adjectives and nouns; no word belongs to two genres."""

GENRES: tuple[str, ...] = tuple(WORDS)

SEQUELS = ("{}", "{} II", "{}: Part 3", "Return of the {}", "{} V")
"""The titles of a franchise's instalments, in the order of their years."""

AGES = ("Under 18", "18-24", "25-34", "35-44", "45-49", "50-55", "56+")

OCCUPATIONS = (
    "academic/educator",
    "artist",
    "clerical/admin",
    "college/grad student",
    "customer service",
    "doctor/health care",
    "executive/managerial",
    "farmer",
    "homemaker",
    "lawyer",
    "programmer",
    "retired",
    "sales/marketing",
    "scientist",
    "self-employed",
    "technician/engineer",
    "tradesman/craftsman",
    "writer",
)
