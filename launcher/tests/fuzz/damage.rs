//! Examples and the damage that is done to them.

use std::fs;
use std::ops::Range;
use std::path::Path;

use proptest::prelude::*;
use proptest::test_runner::Config;

/// Longest input, in bytes: more than the longest packet.
const LONGEST: usize = 160 * 1024;

/// One edit. Positions are relative, so that an edit fits any input.
#[derive(Clone, Debug)]
enum Edit {
    Flip(f64, u8),
    Set(f64, u8),
    Cut(f64),
    Remove(f64, usize),
    Insert(f64, Vec<u8>),
    /// Takes bytes of itself and puts them elsewhere, so many times.
    Repeat(f64, usize, f64, usize),
    /// Puts an extreme number in the place of the next digits.
    Number(f64, &'static str),
    /// Goes on with another example from here.
    Splice(f64, usize, f64),
    /// Repairs the checksum of a tar header near here, so that what was damaged before is believed.
    Checksum(f64),
}

const NUMBERS: [&str; 12] = [
    "0",
    "-1",
    "255",
    "4294967295",
    "4294967296",
    "18446744073709551615",
    "18446744073709551616",
    "1e308",
    "-0.0",
    "77777777777",
    "null",
    "[]",
];

fn edit() -> impl Strategy<Value = Edit> {
    let at = || 0.0..1.0;
    prop_oneof![
        (at(), any::<u8>()).prop_map(|(at, mask)| Edit::Flip(at, mask)),
        (at(), any::<u8>()).prop_map(|(at, byte)| Edit::Set(at, byte)),
        at().prop_map(Edit::Cut),
        (at(), 1usize..600).prop_map(|(at, length)| Edit::Remove(at, length)),
        (at(), prop::collection::vec(any::<u8>(), 1..40)).prop_map(|(at, bytes)| Edit::Insert(at, bytes)),
        (at(), 1usize..1200, at(), 1usize..100)
            .prop_map(|(from, length, to, times)| Edit::Repeat(from, length, to, times)),
        (at(), prop::sample::select(&NUMBERS[..])).prop_map(|(at, number)| Edit::Number(at, number)),
        (at(), any::<usize>(), at()).prop_map(|(at, other, from)| Edit::Splice(at, other, from)),
        at().prop_map(Edit::Checksum),
    ]
}

/// The examples of a folder of the corpus.
pub(crate) fn corpus(folder: &str) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/corpus").join(folder);
    let mut files: Vec<_> = fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    assert!(!files.is_empty(), "{}", folder.display());
    files.iter().map(|file| fs::read(file).unwrap()).collect()
}

/// Any example with up to eight edits.
pub(crate) fn damaged(examples: Vec<Vec<u8>>) -> impl Strategy<Value = Vec<u8>> {
    let edits = prop::collection::vec(edit(), 0..8);
    (0..examples.len(), edits).prop_map(move |(index, edits)| {
        let mut bytes = examples[index].clone();
        for edit in &edits {
            apply(edit, &mut bytes, &examples);
        }
        bytes.truncate(LONGEST);
        bytes
    })
}

/// How many cases a run has.
pub(crate) fn cases(short: u32) -> Config {
    let factor: u32 = std::env::var("FC_FUZZ").ok().and_then(|factor| factor.parse().ok()).unwrap_or(1);
    Config { cases: short.saturating_mul(factor), failure_persistence: None, ..Config::default() }
}

fn apply(edit: &Edit, bytes: &mut Vec<u8>, examples: &[Vec<u8>]) {
    match edit {
        Edit::Flip(at, mask) => change(bytes, *at, |byte| byte ^ mask),
        Edit::Set(at, new) => change(bytes, *at, |_| *new),
        Edit::Cut(at) => bytes.truncate(place(bytes, *at)),
        Edit::Remove(at, length) => drop(bytes.drain(range(bytes, *at, *length))),
        Edit::Insert(at, new) => {
            let at = place(bytes, *at);
            drop(bytes.splice(at..at, new.iter().copied()));
        }
        Edit::Repeat(from, length, to, times) => {
            let piece = bytes[range(bytes, *from, *length)].repeat(*times);
            let to = place(bytes, *to);
            drop(bytes.splice(to..to, piece));
        }
        Edit::Number(at, number) => {
            let from = place(bytes, *at);
            let Some(start) = bytes[from..].iter().position(u8::is_ascii_digit) else { return };
            let digits = bytes[from + start..].iter().take_while(|byte| byte.is_ascii_digit()).count();
            drop(bytes.splice(from + start..from + start + digits, number.bytes()));
        }
        Edit::Splice(at, other, from) => {
            bytes.truncate(place(bytes, *at));
            let other = &examples[other % examples.len()];
            bytes.extend_from_slice(&other[place(other, *from)..]);
        }
        Edit::Checksum(at) => {
            let block = place(bytes, *at) / 512 * 512;
            let Some(header) = bytes.get_mut(block..block + 512) else { return };
            header[148..156].fill(b' ');
            let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
            header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        }
    }
}

fn change(bytes: &mut [u8], at: f64, how: impl Fn(u8) -> u8) {
    let at = place(bytes, at);
    if let Some(byte) = bytes.get_mut(at) {
        *byte = how(*byte);
    }
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_precision_loss,
    reason = "any place will do"
)]
fn place(bytes: &[u8], at: f64) -> usize {
    ((bytes.len() as f64 * at) as usize).min(bytes.len())
}

fn range(bytes: &[u8], at: f64, length: usize) -> Range<usize> {
    let from = place(bytes, at);
    from..(from + length).min(bytes.len())
}
