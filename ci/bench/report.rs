//! The table for people.

use std::io::{self, Write};

use anyhow::Result;

use crate::Row;
use crate::budget::Check;
use crate::handover::HandOver;

/// Tells on stderr what is being measured. A stderr that is gone is no reason to stop.
pub fn progress(what: &str) {
    let _ = writeln!(io::stderr(), "bench: {what}");
}

/// Prints what was measured, and the budgets.
pub fn all(rows: &[Row], handovers: &[HandOver], checks: &[Check]) -> Result<()> {
    let mut out = io::stdout().lock();
    if !rows.is_empty() {
        table(&mut out, rows)?;
        writeln!(out)?;
    }
    if !handovers.is_empty() {
        handover(&mut out, handovers)?;
        writeln!(out)?;
    }
    for check in checks {
        let verdict = if check.met { "met   " } else { "MISSED" };
        let least = check.least.map_or(String::new(), |least| format!("at least {least:.2}, "));
        writeln!(out, "{verdict}  {:>7.3} ({least}at most {:.2})  {}", check.measured, check.limit, check.what)?;
    }
    Ok(())
}

fn table(out: &mut impl Write, rows: &[Row]) -> Result<()> {
    writeln!(
        out,
        "{:<15}  {:>9}  {:>8}  {:>13}  {:>10}  {:>10}  {:>11}  {:>9}",
        "", "size", "shown/s", "instr/frame", "calls/fr.", "start, M", "start calls", "peak, MB"
    )?;
    let number = |value: Option<f64>, digits: usize| value.map_or("-".to_owned(), |value| format!("{value:.digits$}"));
    for row in rows {
        writeln!(
            out,
            "{:<15}  {:>9}  {:>8}  {:>13.0}  {:>10}  {:>10.1}  {:>11}  {:>9.1}",
            row.program.name(),
            format!("{}x{}", row.width, row.height),
            number(row.shown_per_second, 2),
            row.instructions_per_frame,
            number(row.system_calls_per_frame, 2),
            row.startup_instructions / 1e6,
            number(row.startup_system_calls, 0),
            row.peak_resident_kib as f64 * 1024e-6,
        )?;
    }
    writeln!(out)?;
    for program in crate::programs::Program::ALL {
        writeln!(out, "{:<15}  {}", program.name(), program.what())?;
    }
    Ok(())
}

fn handover(out: &mut impl Write, rows: &[HandOver]) -> Result<()> {
    writeln!(out, "{:<15}  {:>13}  calls/frame", "hand-over", "instr/frame")?;
    for row in rows {
        let instructions = row.instructions.map_or("-".to_owned(), |cost| format!("{cost:.0}"));
        let calls: Vec<_> = row
            .calls
            .iter()
            .map(|calls| format!("{:.2} by {}", calls.calls, calls.by))
            .collect();
        let calls = if calls.is_empty() { "-".to_owned() } else { calls.join(", ") };
        writeln!(out, "{:<15}  {instructions:>13}  {calls}", row.way.name())?;
    }
    writeln!(out)?;
    for row in rows {
        writeln!(out, "{:<15}  {}", row.way.name(), row.way.what())?;
    }
    Ok(())
}
