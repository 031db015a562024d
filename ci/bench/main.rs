//! `bench`: measures dmaflow beside GStreamer and beside the floor, inside the virtual machine; see `ci/bench/run`.
//!
//! It wants a guest whose clock counts instructions (`tools/vm/run --icount`): CPU time in nanoseconds is then a number
//! of instructions. It must be the only load there, and root.

mod budget;
mod measure;
mod programs;
mod report;
mod shown;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Parser;
use serde::Serialize;

use programs::{Program, Size};

/// Frames of the long and the short run, for instructions and for system calls alike: the difference leaves the start
/// out.
const LONG: u32 = 660;
const SHORT: u32 = 60;
/// The long run of programs that are measured for their copies alone.
const COPIED: u32 = 180;
/// How many of each for instructions; the median counts. What a frame costs depends on when in the display's cycle it
/// comes (a program that finds it ready does not sleep), so a run is one of a few modes.
const LONG_RUNS: usize = 5;
const SHORT_RUNS: usize = 3;
/// Frames of the run that is traced to see what the display shows.
const TRACED: u32 = 240;

#[derive(Parser)]
struct Arguments {
    /// Where to write the results as JSON.
    #[arg(long, default_value = "target/vm/out/bench.json")]
    out: PathBuf,
    /// Measure these alone (by the names of the table, or `copies`), and check no budget but that of the copies.
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Measure these widths alone, and check no budget.
    #[arg(long, value_delimiter = ',')]
    widths: Vec<u32>,
}

/// One program at one size.
#[derive(Serialize, Clone, Debug)]
struct Row {
    program: Program,
    width: u32,
    height: u32,
    camera_fps: u32,
    /// Of the process, in user space and in the kernel.
    instructions_per_frame: f64,
    startup_instructions: f64,
    peak_resident_kib: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    shown_per_second: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    system_calls_per_frame: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    startup_system_calls: Option<f64>,
}

fn main() -> Result<ExitCode> {
    let arguments = Arguments::parse();
    // Its plug-in registry is made at the first start and is no part of what a user pays each time.
    measure::run(&programs::warm_up()).context("start GStreamer")?;
    let mut rows = Vec::new();
    // Those that copy beside one that is measured in full otherwise.
    let quick = arguments.only == [Program::COPIES];
    for size in Size::ALL {
        let mode = measure::mode_of(&Program::DmaflowFifo.command(size, None, 2));
        let mode = mode.as_deref();
        for program in Program::ALL {
            let wanted = arguments.only.is_empty() || arguments.only.iter().any(|name| program.is_called(name));
            let width = arguments.widths.is_empty() || arguments.widths.contains(&size.width);
            let here = program.measured_at(size) && !(quick && size != Size::ALL[0]);
            if wanted && width && here {
                report::progress(&format!("{} {}x{}", program.name(), size.width, size.height));
                rows.push(
                    row(program, size, mode, quick || program.copies())
                        .with_context(|| format!("{} at {size:?}", program.name()))?,
                );
            }
        }
    }
    let complete = arguments.only.is_empty() && arguments.widths.is_empty();
    let copies = complete || arguments.only.iter().any(|name| name == Program::COPIES);
    let mut checks = if complete { budget::check(&rows) } else { Vec::new() };
    if copies {
        checks.extend(budget::check_copies(&rows));
    }
    write_json(&arguments.out, &rows, &checks)?;
    report::table(&rows, &checks)?;
    Ok(if checks.iter().all(|check| check.met) { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn row(program: Program, size: Size, mode: Option<&str>, quick: bool) -> Result<Row> {
    let command = |frames| program.command(size, mode, frames);
    // Copies cost so much that neither the modes of a run nor its length matter.
    let (long_frames, runs) = if quick { (COPIED, 1) } else { (LONG, LONG_RUNS) };
    let (short, short_peak) = median_cost(&command(SHORT), runs.min(SHORT_RUNS))?;
    let (long, long_peak) = median_cost(&command(long_frames), runs)?;
    let instructions = (long - short) / f64::from(long_frames - SHORT);
    let mut row = Row {
        program,
        width: size.width,
        height: size.height,
        camera_fps: size.rate,
        instructions_per_frame: instructions,
        startup_instructions: short - f64::from(SHORT) * instructions,
        peak_resident_kib: short_peak.max(long_peak),
        shown_per_second: None,
        system_calls_per_frame: None,
        startup_system_calls: None,
    };
    if size.rate == 60 {
        row.shown_per_second = Some(shown::per_second(&command(TRACED))?);
    }
    // The calls do not depend on the size.
    if size == Size::ALL[0] && !quick {
        let calls = |frames| measure::system_calls(&command(frames));
        let (short, long) = (calls(SHORT)? as f64, calls(LONG)? as f64);
        let each = (long - short) / f64::from(LONG - SHORT);
        row.system_calls_per_frame = Some(each);
        row.startup_system_calls = Some(short - f64::from(SHORT) * each);
    }
    Ok(row)
}

/// The median of the instructions of some runs, and the most memory of all of them.
fn median_cost(command: &[String], runs: usize) -> Result<(f64, u64)> {
    let mut costs = Vec::new();
    let mut peak = 0;
    for run in 0..runs {
        // Each run starts elsewhere in the camera's and the display's cycle of 16.7 ms.
        std::thread::sleep(Duration::from_micros(3700 * run as u64));
        let usage = measure::run(command)?;
        costs.push(usage.cpu_ns);
        peak = peak.max(usage.peak_resident_kib);
    }
    costs.sort_unstable();
    Ok((costs.get(runs / 2).copied().unwrap_or_default() as f64, peak))
}

fn write_json(path: &Path, rows: &[Row], checks: &[budget::Check]) -> Result<()> {
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let value = serde_json::json!({ "kernel": kernel.trim(), "rows": rows, "budgets": checks });
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    std::fs::write(path, serde_json::to_string_pretty(&value)? + "\n").with_context(|| path.display().to_string())
}
