//! The assembler: a policy becomes a balanced tree of comparisons, about eight for any call instead of hundreds.

use libc::sock_filter;

use super::{Policy, Rule, Verdict};

const LOAD: u16 = 0x20; // BPF_LD | BPF_W | BPF_ABS
const JUMP: u16 = 0x05; // BPF_JMP | BPF_JA
const IF_EQUAL: u16 = 0x15; // BPF_JMP | BPF_JEQ | BPF_K
const IF_AT_LEAST: u16 = 0x35; // BPF_JMP | BPF_JGE | BPF_K
const IF_ANY_BIT: u16 = 0x45; // BPF_JMP | BPF_JSET | BPF_K
const RETURN: u16 = 0x06; // BPF_RET | BPF_K

// Offsets in `struct seccomp_data`.
const NUMBER: u32 = 0;
const ARCH: u32 = 4;
const ARGUMENTS: u32 = 16;

/// The filter program of a policy.
pub(super) fn compile(policy: &Policy) -> Vec<sock_filter> {
    let mut program = vec![
        instruction(LOAD, 0, 0, ARCH),
        instruction(IF_EQUAL, 1, 0, policy.arch),
        answer(Verdict::Kill),
        instruction(LOAD, 0, 0, NUMBER),
    ];
    program.extend(tree(&ranges(policy)));
    program
}

/// The policy as ranges of numbers with one rule each, by their first number.
fn ranges(policy: &Policy) -> Vec<(u32, Rule)> {
    let mut ranges: Vec<(u32, Rule)> = Vec::new();
    for number in 0..=policy.newest + 1 {
        let rule = policy.rule(number);
        if ranges.last().is_none_or(|(_, last)| *last != rule) {
            ranges.push((number, rule));
        }
    }
    ranges
}

/// Halves the ranges until one is left. The upper half follows the lower one.
fn tree(ranges: &[(u32, Rule)]) -> Vec<sock_filter> {
    let middle = ranges.len() / 2;
    let (lower, upper) = ranges.split_at(middle);
    let Some((first_of_upper, rule)) = upper.first() else { return Vec::new() };
    if lower.is_empty() {
        return leaf(rule);
    }
    let (lower, upper) = (tree(lower), tree(upper));
    let mut program = Vec::with_capacity(lower.len() + upper.len() + 2);
    match u8::try_from(lower.len()) {
        Ok(distance) => program.push(instruction(IF_AT_LEAST, distance, 0, *first_of_upper)),
        Err(_) => {
            // A conditional jump reaches 255 instructions, an unconditional one any.
            program.push(instruction(IF_AT_LEAST, 0, 1, *first_of_upper));
            program.push(instruction(JUMP, 0, 0, u32::try_from(lower.len()).unwrap_or(u32::MAX)));
        }
    }
    program.extend(lower);
    program.extend(upper);
    program
}

fn leaf(rule: &Rule) -> Vec<sock_filter> {
    match rule {
        Rule::Always(verdict) => vec![answer(*verdict)],
        Rule::NoneOf { argument, bits, refusal } => vec![
            load_argument(*argument),
            instruction(IF_ANY_BIT, 1, 0, *bits),
            answer(Verdict::Allow),
            answer(Verdict::Refuse(*refusal)),
        ],
        Rule::OneOf { argument, values, refusal } => {
            let mut program = vec![load_argument(*argument)];
            for value in *values {
                program.push(instruction(IF_EQUAL, 0, 1, *value));
                program.push(answer(Verdict::Allow));
            }
            program.push(answer(Verdict::Refuse(*refusal)));
            program
        }
    }
}

/// Loads the lower half of an argument; both of our instruction sets store it first.
fn load_argument(index: u32) -> sock_filter {
    instruction(LOAD, 0, 0, ARGUMENTS + 8 * index)
}

fn answer(verdict: Verdict) -> sock_filter {
    let value = match verdict {
        Verdict::Allow => libc::SECCOMP_RET_ALLOW,
        Verdict::Refuse(errno) => libc::SECCOMP_RET_ERRNO | u32::from(errno),
        Verdict::Notify => libc::SECCOMP_RET_USER_NOTIF,
        Verdict::Kill => libc::SECCOMP_RET_KILL_PROCESS,
    };
    instruction(RETURN, 0, 0, value)
}

const fn instruction(code: u16, jt: u8, jf: u8, k: u32) -> sock_filter {
    sock_filter { code, jt, jf, k }
}

#[cfg(test)]
mod tests {
    use super::super::{refuse, table};
    use super::*;

    /// One call as the filter sees it.
    #[derive(Clone, Copy)]
    struct Call {
        arch: u32,
        number: u32,
        arguments: [u64; 6],
    }

    /// The kernel's filter machine, as far as our programs use it. Returns the answer and the instructions executed.
    fn run(program: &[sock_filter], call: Call) -> (u32, usize) {
        let mut accumulator = 0;
        let mut at = 0;
        for executed in 1.. {
            let now = program[at];
            at += 1;
            let jump = |condition: bool| usize::from(if condition { now.jt } else { now.jf });
            match now.code {
                LOAD => accumulator = load(call, now.k),
                JUMP => at += now.k as usize,
                IF_EQUAL => at += jump(accumulator == now.k),
                IF_AT_LEAST => at += jump(accumulator >= now.k),
                IF_ANY_BIT => at += jump(accumulator & now.k != 0),
                RETURN => return (now.k, executed),
                other => panic!("an instruction that we never make: {other:#x}"),
            }
        }
        unreachable!()
    }

    fn load(call: Call, offset: u32) -> u32 {
        let mut data = Vec::new();
        data.extend(call.number.to_ne_bytes());
        data.extend(call.arch.to_ne_bytes());
        data.extend(0xdead_beef_u64.to_ne_bytes());
        data.extend(call.arguments.iter().flat_map(|argument| argument.to_ne_bytes()));
        let at = offset as usize;
        u32::from_ne_bytes(data[at..at + 4].try_into().unwrap())
    }

    /// The declared policy, read directly.
    fn decide(policy: &Policy, call: Call) -> Verdict {
        if call.arch != policy.arch {
            return Verdict::Kill;
        }
        let low = |argument: u32| u32::try_from(call.arguments[argument as usize] & 0xffff_ffff).unwrap();
        match policy.rule(call.number) {
            Rule::Always(verdict) => verdict,
            Rule::NoneOf { argument, bits, .. } if low(argument) & bits == 0 => Verdict::Allow,
            Rule::OneOf { argument, values, .. } if values.contains(&low(argument)) => Verdict::Allow,
            Rule::NoneOf { refusal, .. } | Rule::OneOf { refusal, .. } => Verdict::Refuse(refusal),
        }
    }

    /// Values that sit on each side of every condition of the policy.
    fn interesting_values() -> Vec<u64> {
        let mut values: Vec<u64> = (0..64).map(|bit| 1 << bit).collect();
        values.extend(0..64);
        values.extend([
            0xffff_ffff,
            u64::MAX,
            0x20008,
            0x7e02_0000,
            0x3d0f00,
            17 | 0x0100_0000,
            1 << 40 | 1,
            1 << 32,
        ]);
        values
    }

    #[test]
    fn the_program_says_what_the_policy_says_for_every_number_and_argument() {
        let mut policy = table::policy();
        let notifying = compile(&policy);
        let plain = {
            policy.allow_notified();
            compile(&policy)
        };
        let policies = [(table::policy(), notifying), (policy, plain)];
        for (policy, program) in &policies {
            assert!(program.len() <= 4096, "{} instructions", program.len());
            let numbers = (0..policy.newest + 200).chain([0x3fff_ffff, 0x4000_0000, 0x4000_0001, u32::MAX]);
            for number in numbers {
                for value in interesting_values() {
                    for argument in 0..2 {
                        let mut arguments = [0x5555_5555_5555_5555; 6];
                        arguments[argument] = value;
                        let call = Call { arch: policy.arch, number, arguments };
                        let (result, _) = run(program, call);
                        assert_eq!(
                            result,
                            answer(decide(policy, call)).k,
                            "call {number}, argument {value:#x}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn another_instruction_set_is_the_end() {
        let program = compile(&table::policy());
        for arch in [0, 0x4000_0003, 0x4000_003e, 0xc000_003f] {
            let call = Call { arch, number: 1, arguments: [0; 6] };
            assert_eq!(run(&program, call).0, libc::SECCOMP_RET_KILL_PROCESS);
        }
    }

    #[test]
    fn no_call_takes_more_than_a_few_comparisons() {
        let policy = table::policy();
        let program = compile(&policy);
        let most = (0..=policy.newest + 1)
            .map(|number| run(&program, Call { arch: policy.arch, number, arguments: [0; 6] }).1)
            .max();
        assert!(most.unwrap() <= 20, "{most:?} of {}", program.len());
    }

    #[test]
    fn the_tree_also_holds_when_branches_are_too_long_for_a_short_jump() {
        let mut policy = table::policy();
        policy.newest = 4000;
        for number in (0..4000).step_by(2) {
            let verdict = if number % 4 == 0 { Verdict::Allow } else { refuse(libc::EIO) };
            policy.rules.insert(number, Rule::Always(verdict));
        }
        let program = compile(&policy);
        for number in 0..4100 {
            let call = Call { arch: policy.arch, number, arguments: [0; 6] };
            assert_eq!(run(&program, call).0, answer(decide(&policy, call)).k, "call {number}");
        }
    }
}
