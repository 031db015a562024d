//! Layouts as nobody means them, among usual ones: for the properties of layouts and of what takes them.

use std::cell::Cell;

use proptest::prelude::*;
use proptest::test_runner::{Config, TestCaseError, TestCaseResult, TestRunner};

use super::{Format, LayoutError, PlaneLayout};

/// Small, usual, anything, and at the end of what there is.
pub(crate) fn number() -> impl Strategy<Value = u32> {
    prop_oneof![4 => 0..64_u32, 4 => 64..4096_u32, 1 => any::<u32>(), 1 => u32::MAX - 64..=u32::MAX]
}

/// A format, a size and places for its planes: mostly rows as long as they must be or somewhat longer.
pub(crate) fn layout() -> impl Strategy<Value = (Format, (u32, u32), Vec<PlaneLayout>)> {
    let size = || prop_oneof![9 => 1..4096_u32, 1 => number().prop_map(|number| number.max(1))];
    let stride = prop_oneof![15 => (0..300_u32).prop_map(Ok), 1 => number().prop_map(Err)];
    let offset = prop_oneof![15 => 0..1_000_000_u32, 1 => number()];
    let places = prop::collection::vec((0..6_u32, offset, stride), 4);
    (0..Format::all().len(), (size(), size()), places).prop_map(|(index, size, places)| {
        let format = Format::all().nth(index).unwrap();
        let place = |(plane, (memory, offset, stride)): (usize, (u32, u32, Result<u32, u32>))| {
            let natural = format.row_bytes(plane, size.0);
            let stride = stride.map_or_else(|stride| stride, |more| natural.saturating_add(more));
            PlaneLayout { memory, offset, stride }
        };
        let places = places.into_iter().take(format.planes()).enumerate().map(place).collect();
        (format, size, places)
    })
}

/// That the plane which the refusal names has the fault that it names.
pub(crate) fn rightly_refused(
    error: &LayoutError,
    format: Format,
    size: (u32, u32),
    places: &[PlaneLayout],
) -> TestCaseResult {
    let plane = match *error {
        LayoutError::Stride { plane, stride, row } => {
            prop_assert!(stride < row && places[plane].stride == stride, "{}", error);
            prop_assert!(error.to_string().contains("stride"));
            plane
        }
        LayoutError::Overflow { plane } => {
            let PlaneLayout { offset, stride, .. } = places[plane];
            let end = u64::from(offset) + u64::from(stride) * u64::from(format.rows(plane, size.1));
            prop_assert!(end > u64::from(u32::MAX), "{} at {}", error, end);
            plane
        }
        _ => return Err(TestCaseError::fail(format!("refused for what it is not: {error}"))),
    };
    prop_assert!(error.to_string().contains(&format!("plane {plane}")), "{}", error);
    Ok(())
}

/// Runs a property that says whether it was an answer; of a good mix a quarter at least are, and one in twenty is none.
pub(crate) fn both_ways<S: Strategy>(strategy: S, property: impl Fn(S::Value) -> Result<bool, TestCaseError>) {
    let (answers, refusals) = (Cell::new(0_u32), Cell::new(0_u32));
    let config = Config { source_file: Some(file!()), ..Config::default() };
    let ran = TestRunner::new(config).run(&strategy, |value| {
        let count = if property(value)? { &answers } else { &refusals };
        count.set(count.get() + 1);
        Ok(())
    });
    if let Err(error) = ran {
        panic!("{error}");
    }
    let (answers, refusals) = (answers.get(), refusals.get());
    let all = answers + refusals;
    assert!(all < 64 || (answers * 4 >= all && refusals * 20 >= all), "{answers} answers, {refusals} refusals");
}
