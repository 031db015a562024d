//! What dmaflow may cost.

use serde::Serialize;

use crate::Row;
use crate::handover::{HandOver, Way};
use crate::programs::Program;

/// GStreamer's start, in instructions, as it was measured when the budget was set.
const GST_START: f64 = 300e6;

/// One budget: met, or not.
#[derive(Clone, Debug, Serialize)]
pub struct Check {
    pub what: String,
    pub measured: f64,
    pub limit: f64,
    /// What is less than this is not what was to be measured.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub least: Option<f64>,
    pub met: bool,
}

/// All budgets. A row that is missing misses its budget.
pub fn check(rows: &[Row]) -> Vec<Check> {
    let row = |program, width| rows.iter().find(|row| row.program == program && row.width == width);
    let cost = |program, width| row(program, width).map_or(f64::NAN, |row: &Row| row.instructions_per_frame);
    let mut checks = Vec::new();
    let mut at_most = |what: String, measured: f64, limit: f64| {
        // A comparison with what was not measured (NaN) is false.
        checks.push(Check { what, measured, limit, least: None, met: measured <= limit });
    };
    let pairs = [(Program::DmaflowFifo, Program::FloorBlocking), (Program::DmaflowMailbox, Program::FloorEvents)];
    for (program, floor) in pairs {
        let name = program.name();
        for (width, height) in [(640, 360), (1280, 720)] {
            let at = format!("at {width}x{height}");
            let mine = cost(program, width);
            // Of 60 that the camera makes; one lost in the three seconds and a half that are looked at is too many.
            let shown = row(program, width).and_then(|row| row.shown_per_second).unwrap_or(f64::NAN);
            at_most(format!("{name} {at}: frames not shown, of 60"), 60.0 - shown, 0.1);
            at_most(format!("{name} {at}: of {}", floor.name()), mine / cost(floor, width), 1.15);
            at_most(format!("{name} {at}: of {}", Program::GstBest.name()), mine / cost(Program::GstBest, width), 0.65);
        }
        let small = row(program, 640);
        let of = |value: fn(&Row) -> f64| small.map_or(f64::NAN, value);
        let start = of(|row| row.startup_instructions);
        let gst = row(Program::GstBest, 640).map_or(f64::NAN, |row| row.startup_instructions);
        at_most(format!("{name}: start, of 300 million instructions"), start / GST_START, 0.05);
        at_most(format!("{name}: start, of {}'s", Program::GstBest.name()), start / gst, 0.05);
        at_most(
            format!("{name}: resident memory at its peak, MB"),
            of(|row| row.peak_resident_kib as f64 * 1024e-6),
            6.0,
        );
        let calls = if program == Program::DmaflowFifo { 4.1 } else { 6.1 };
        at_most(
            format!("{name}: system calls a frame"),
            of(|row| row.system_calls_per_frame.unwrap_or(f64::NAN)),
            calls,
        );
        let growth = |program| cost(program, 1920) / cost(program, 640);
        let against = growth(program) / growth(floor);
        at_most(format!("{name}: growth from 640x360 to 1920x1080, of {}'s", floor.name()), against, 1.05);
    }
    checks
}

/// What a copy may cost beside GStreamer's. NV12 is not copied where the display takes it, which costs less still.
pub fn check_copies(rows: &[Row]) -> Vec<Check> {
    let cost = |program| {
        let row = rows.iter().find(|row| row.program == program && row.width == 640);
        row.map_or(f64::NAN, |row| row.instructions_per_frame)
    };
    let pairs = [
        (Program::DmaflowCopy, Program::GstCopy, 0.6),
        (Program::DmaflowYuyv, Program::GstYuyv, 1.0),
        (Program::DmaflowNv12, Program::GstNv12, 1.0),
    ];
    let check = |(program, other, limit): (Program, Program, f64)| {
        let measured = cost(program) / cost(other);
        Check {
            what: format!("{}: of {}", program.name(), other.name()),
            measured,
            limit,
            least: None,
            met: measured <= limit,
        }
    };
    pairs.into_iter().map(check).collect()
}

/// What it may cost that a frame changes hands. What was not measured misses its budget.
pub fn check_handover(all: &[HandOver]) -> Vec<Check> {
    let of = |way| all.iter().find(|row| row.way == way);
    let instructions = |way| of(way).and_then(|row| row.instructions).unwrap_or(f64::NAN);
    let calls = |way, by| {
        let calls = of(way).and_then(|row| row.calls.iter().find(|calls| calls.by == by));
        calls.map_or(f64::NAN, |calls| calls.calls)
    };
    let awake = instructions(Way::Awake);
    // At most so much; and at least so much, where less is a call by another name, or a consumer that did not sleep.
    let checks = [
        ("ring: instructions a frame", instructions(Way::Ring), 200.0, Some(50.0)),
        ("ring: system calls a frame", calls(Way::Ring, "both"), 0.001, None),
        // ci/handover's budget is less: under valgrind the clock is a system call, whose instructions callgrind does not see.
        ("awake: instructions a frame", awake, 1400.0, Some(200.0)),
        // Descriptors are looked at ten times a second.
        ("awake: system calls a frame", calls(Way::Awake, "both"), 0.02, None),
        ("asleep: system calls of the server a frame", calls(Way::Asleep, "server"), 1.05, Some(0.9)),
        ("asleep: system calls of the consumer a frame", calls(Way::Asleep, "consumer"), 1.05, Some(0.9)),
        // One of each side, and that by which the program waits for the time.
        ("asleep: system calls a frame", calls(Way::Asleep, "all"), 3.5, Some(2.8)),
        ("awake: instructions, of message's", awake / instructions(Way::Message), 0.25, None),
        ("awake: instructions, of memcpy's", awake / instructions(Way::Memcpy), 0.01, None),
    ];
    let check = |(what, measured, limit, least): (&str, f64, f64, Option<f64>)| Check {
        what: format!("hand-over, {what}"),
        measured,
        limit,
        least,
        met: measured <= limit && least.is_none_or(|least| measured >= least),
    };
    checks.into_iter().map(check).collect()
}
